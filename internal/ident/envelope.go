package ident

import (
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/json"
	"io"
	"time"

	"github.com/gowebpki/jcs"
	"github.com/secure-systems-lab/go-securesystemslib/dsse"

	"webgw.dev/webgw"
)

// PayloadType marks what an envelope of ours holds; it is part of what is
// signed, so that a signature made for something else never counts here.
const PayloadType = "application/vnd.webgw.record+json"

// Signed is a record together with the envelope that proves it. Only Sign and
// Verify make one.
type Signed struct {
	Record *webgw.Record
	raw    []byte
}

// Envelope returns the DSSE envelope as JSON bytes, exactly as verified. The
// caller must not change them.
func (s Signed) Envelope() []byte { return s.raw }

// IsZero reports whether s holds nothing.
func (s Signed) IsZero() bool { return s.Record == nil }

// Sign validates the record, sets its owner to k, and wraps its canonical JSON
// (RFC 8785) in a DSSE envelope. Times are cut to whole seconds. What it returns
// shares nothing with r.
func (k Key) Sign(r webgw.Record) (Signed, error) {
	if k.IsZero() {
		return Signed{}, &webgw.Error{Op: "sign", Kind: webgw.Unauthenticated, Public: "there is no key to sign with"}
	}
	r.Owner = k.ID()
	oneTime(&r)
	if err := r.Validate(); err != nil {
		return Signed{}, err
	}
	payload, err := canonical(&r)
	if err != nil {
		return Signed{}, err
	}
	raw, err := json.Marshal(dsse.Envelope{
		PayloadType: PayloadType,
		Payload:     base64.StdEncoding.EncodeToString(payload),
		Signatures: []dsse.Signature{{
			KeyID: r.Owner.String(),
			Sig:   base64.StdEncoding.EncodeToString(k.sign(dsse.PAE(PayloadType, payload))),
		}},
	})
	if err != nil {
		return Signed{}, err
	}
	if len(raw) > webgw.MaxEnvelope {
		return Signed{}, &webgw.Error{Op: "sign", Kind: webgw.Invalid, Public: "the record is larger than 64 KiB when signed"}
	}
	return Verify(raw)
}

// oneTime brings a record's times into the form that is signed: UTC, whole
// seconds.
func oneTime(r *webgw.Record) {
	r.Issued = r.Issued.UTC().Truncate(time.Second)
	r.Expires = r.Expires.UTC().Truncate(time.Second)
}

// canonical gives the one spelling of v: RFC 8785 over what encoding/json makes.
func canonical(v any) ([]byte, error) {
	plain, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	return jcs.Transform(plain)
}

// Verify opens an envelope: it must be small, carry exactly one signature, be
// signed by the record's own owner over the one spelling of a valid record,
// which is what Sign writes. Of the envelope itself, only white space and the
// order of keys are free. Expiry is not judged here (Record.CheckAt).
func Verify(raw []byte) (Signed, error) {
	fail := func(kind webgw.ErrorKind, public string, err error) (Signed, error) {
		return Signed{}, &webgw.Error{Op: "verify record", Kind: kind, Public: public, Err: err}
	}
	if len(raw) > webgw.MaxEnvelope {
		return fail(webgw.Invalid, "the envelope is larger than 64 KiB", nil)
	}
	var env dsse.Envelope
	if err := decodeStrict(raw, &env); err != nil {
		return fail(webgw.Invalid, "the envelope is not DSSE JSON", err)
	}
	if env.PayloadType != PayloadType {
		return fail(webgw.Invalid, "the envelope's payloadType is not "+PayloadType, nil)
	}
	if len(env.Signatures) != 1 {
		return fail(webgw.Invalid, "the envelope must carry exactly one signature", nil)
	}
	payload, err := base64.StdEncoding.Strict().DecodeString(env.Payload)
	if err != nil {
		return fail(webgw.Invalid, "the envelope's payload is not base64", err)
	}
	sig, err := base64.StdEncoding.Strict().DecodeString(env.Signatures[0].Sig)
	if err != nil {
		return fail(webgw.Invalid, "the envelope's signature is not base64", err)
	}
	owner, err := webgw.ParseID(env.Signatures[0].KeyID)
	if err != nil {
		return fail(webgw.Invalid, "the envelope's keyid is not an identity", err)
	}
	// The signature first: nothing unsigned reaches the record's parser.
	if !ed25519.Verify(owner[:], dsse.PAE(PayloadType, payload), sig) {
		return fail(webgw.Unauthenticated, "the signature does not verify", nil)
	}
	var version struct {
		V int `json:"v"`
	}
	if err := json.Unmarshal(payload, &version); err == nil && version.V > webgw.Protocol {
		return Signed{}, (&webgw.Record{Version: version.V}).Validate()
	}
	var r webgw.Record
	if err := decodeStrict(payload, &r); err != nil {
		return fail(webgw.Invalid, "the signed record can't be read: "+err.Error(), err)
	}
	// One spelling only. Duplicate keys, keys in another case (which Go's parser
	// takes for the same), defaults written out, times in other zones: all that
	// another parser may read in another way comes out differently here. So a
	// field that a later version adds must be omitted when it is zero.
	oneTime(&r)
	if one, err := canonical(&r); err != nil || !bytes.Equal(one, payload) {
		return fail(webgw.Invalid, "the signed record is not in canonical form (RFC 8785)", err)
	}
	// The same for the envelope, whose bytes nobody has signed.
	env.Payload = base64.StdEncoding.EncodeToString(payload)
	env.Signatures[0] = dsse.Signature{KeyID: owner.String(), Sig: base64.StdEncoding.EncodeToString(sig)}
	one, err := canonical(&env)
	if err != nil {
		return fail(webgw.Internal, "the envelope can't be written", err)
	}
	if got, err := jcs.Transform(raw); err != nil || !bytes.Equal(got, one) {
		return fail(webgw.Invalid, "the envelope has duplicate keys or odd spellings", err)
	}
	if r.Owner != owner {
		return fail(webgw.Unauthenticated, "the record's owner is not who signed it", nil)
	}
	if err := r.Validate(); err != nil {
		return Signed{}, err
	}
	return Signed{&r, bytes.Clone(raw)}, nil
}

func decodeStrict(data []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return err
	}
	if _, err := d.Token(); err != io.EOF {
		return errTrailing
	}
	return nil
}

var errTrailing = &webgw.Error{Kind: webgw.Invalid, Public: "more data follows the JSON value"}
