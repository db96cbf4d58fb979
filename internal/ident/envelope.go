package ident

import (
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/json"
	"io"

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
// (RFC 8785) in a DSSE envelope. Times are cut to whole seconds.
func (k Key) Sign(r webgw.Record) (Signed, error) {
	r.Owner = k.ID()
	r.Issued = r.Issued.UTC().Truncate(1e9)
	r.Expires = r.Expires.UTC().Truncate(1e9)
	if err := r.Validate(); err != nil {
		return Signed{}, err
	}
	plain, err := json.Marshal(&r)
	if err != nil {
		return Signed{}, err
	}
	payload, err := jcs.Transform(plain)
	if err != nil {
		return Signed{}, err
	}
	raw, err := json.Marshal(dsse.Envelope{
		PayloadType: PayloadType,
		Payload:     base64.StdEncoding.EncodeToString(payload),
		Signatures: []dsse.Signature{{
			KeyID: r.Owner.String(),
			Sig:   base64.StdEncoding.EncodeToString(ed25519.Sign(k.private, dsse.PAE(PayloadType, payload))),
		}},
	})
	if err != nil {
		return Signed{}, err
	}
	if len(raw) > webgw.MaxEnvelope {
		return Signed{}, &webgw.Error{Op: "sign", Kind: webgw.Invalid, Public: "the record is larger than 64 KiB when signed"}
	}
	return Signed{&r, raw}, nil
}

// Verify opens an envelope: it must be small, carry exactly one signature, be
// signed by the record's own owner over canonical JSON without unknown fields,
// and hold a valid record. Expiry is not judged here (Record.CheckAt).
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
	// One spelling only: duplicate keys and other ways of saying two things to
	// two parsers are not canonical.
	if canonical, err := jcs.Transform(payload); err != nil || !bytes.Equal(canonical, payload) {
		return fail(webgw.Invalid, "the signed record is not canonical JSON (RFC 8785)", err)
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
