package live

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"webgw.dev/webgw/internal/ident"
)

// A snapshot is a text file: a line of magic and the SHA-256 of all that
// follows, a line of JSON about the whole, and one signed envelope per line.
// The checksum finds damage; forgery is found by the signatures.
const magic = "webgw-snapshot-1"

type snapshotHeader struct {
	Rev     int64     `json:"rev"`
	Epoch   string    `json:"epoch"`
	Saved   time.Time `json:"saved"`
	Records int       `json:"records"`
}

// previous is the generation before: read when the newest is damaged.
func previous(path string) string { return path + ".old" }

// save writes the snapshot: beside it, synced, then renamed over it.
func (f *Follower) save() error {
	if f.Path == "" {
		return nil
	}
	var body bytes.Buffer
	enc := json.NewEncoder(&body)
	if err := enc.Encode(snapshotHeader{f.rev, f.epoch, time.Now().UTC(), len(f.records)}); err != nil {
		return err
	}
	for _, e := range f.records {
		// Compact: an envelope may have come with line ends in it.
		if err := json.Compact(&body, e.signed.Envelope()); err != nil {
			return err
		}
		body.WriteByte('\n')
	}
	sum := sha256.Sum256(body.Bytes())
	if err := os.MkdirAll(filepath.Dir(f.Path), 0o700); err != nil {
		return err
	}
	tmp, err := os.CreateTemp(filepath.Dir(f.Path), filepath.Base(f.Path)+".new-*")
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	_, err1 := fmt.Fprintf(tmp, "%s %s\n", magic, hex.EncodeToString(sum[:]))
	_, err2 := tmp.Write(body.Bytes())
	if err := errors.Join(err1, err2, tmp.Sync(), tmp.Close()); err != nil {
		return err
	}
	// A crash between the two leaves the previous one, which load finds.
	if err := os.Rename(f.Path, previous(f.Path)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Rename(tmp.Name(), f.Path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(f.Path))
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// load reads the newest snapshot that is whole. Damaged ones are put aside,
// loudly, for people to look at.
func (f *Follower) load() {
	if f.Path == "" {
		return
	}
	for _, path := range []string{f.Path, previous(f.Path)} {
		header, records, err := readSnapshot(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			aside := fmt.Sprintf("%s.damaged-%d", path, time.Now().Unix())
			f.m.refused.WithLabelValues("damaged").Inc()
			f.Log.Error("the snapshot is damaged and was put aside", "path", path, "aside", aside, "err", errors.Join(err, os.Rename(path, aside)))
			continue
		}
		now := time.Now()
		for _, raw := range records {
			s, err := ident.Verify(raw)
			if err != nil {
				f.m.refused.WithLabelValues("unverified").Inc()
				f.Log.Error("a record in the snapshot does not verify", "path", path, "err", err)
				// What was dropped must be asked for again.
				header = snapshotHeader{}
				continue
			}
			f.consider(s, now)
		}
		f.rev, f.epoch = header.Rev, header.Epoch
		f.Log.Info("the snapshot was read", "path", path, "rev", header.Rev, "records", len(f.records), "saved", header.Saved)
		return
	}
}

func readSnapshot(path string) (h snapshotHeader, records [][]byte, err error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return h, nil, err
	}
	first, body, ok := bytes.Cut(data, []byte("\n"))
	sum := sha256.Sum256(body)
	if !ok || string(first) != magic+" "+hex.EncodeToString(sum[:]) {
		return h, nil, errors.New("live: the checksum does not match")
	}
	in := bufio.NewReader(bytes.NewReader(body))
	line, err := in.ReadBytes('\n')
	if err != nil {
		return h, nil, fmt.Errorf("live: the header is cut: %w", err)
	}
	if err := json.Unmarshal(line, &h); err != nil {
		return h, nil, fmt.Errorf("live: header: %w", err)
	}
	for {
		line, err := in.ReadBytes('\n')
		if err == io.EOF {
			break
		}
		if err != nil {
			return h, nil, err
		}
		records = append(records, bytes.TrimSuffix(line, []byte("\n")))
	}
	if len(records) != h.Records {
		return h, nil, fmt.Errorf("live: %d records, not %d", len(records), h.Records)
	}
	return h, records, nil
}
