//go:build linux

package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io"

	xhttp2 "golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// multiplex keeps as many requests of one HTTP/2 connection under way (RFC
// 9113). It works on frames, as a client such as net/http's would need more of
// the processor than what is measured: whatever one read brings is answered
// with new requests by one write.
func (v *visitor) multiplex(m *meter, streams int) error {
	const plenty = 1 << 30 // window, bytes
	r, w := bufio.NewReaderSize(v.Conn, 64<<10), bufio.NewWriterSize(v.Conn, 64<<10)
	f := xhttp2.NewFramer(w, r)
	f.SetReuseFrames()
	var block bytes.Buffer
	enc := hpack.NewEncoder(&block)
	next := uint32(1)
	request := func() error {
		block.Reset()
		for _, h := range [...]hpack.HeaderField{{Name: ":method", Value: "GET"}, {Name: ":scheme", Value: "https"},
			{Name: ":authority", Value: v.at.Host}, {Name: ":path", Value: "/small"}} {
			if err := enc.WriteField(h); err != nil {
				return err
			}
		}
		err := f.WriteHeaders(xhttp2.HeadersFrameParam{StreamID: next, BlockFragment: block.Bytes(), EndStream: true, EndHeaders: true})
		next += 2
		return err
	}
	status := ""
	dec := hpack.NewDecoder(4096, func(h hpack.HeaderField) {
		if h.Name == ":status" {
			status = h.Value
		}
	})
	if _, err := io.WriteString(w, xhttp2.ClientPreface); err != nil {
		return err
	}
	if err := f.WriteSettings(xhttp2.Setting{ID: xhttp2.SettingEnablePush, Val: 0}); err != nil {
		return err
	}
	if err := f.WriteWindowUpdate(0, plenty); err != nil {
		return err
	}
	for range streams {
		if err := request(); err != nil {
			return err
		}
	}
	for got := 0; ; {
		if r.Buffered() == 0 {
			if err := w.Flush(); err != nil {
				return err
			}
		}
		frame, err := f.ReadFrame()
		if err != nil {
			return err
		}
		ended := false
		switch frame := frame.(type) {
		case *xhttp2.HeadersFrame:
			status = ""
			if _, err := dec.Write(frame.HeaderBlockFragment()); err != nil {
				return err
			}
			if status != "200" || !frame.HeadersEnded() {
				return fmt.Errorf("HTTP/2 answer with status %q", status)
			}
			ended = frame.StreamEnded()
		case *xhttp2.DataFrame:
			if got += int(frame.Length); got > plenty/2 {
				if err := f.WriteWindowUpdate(0, uint32(got)); err != nil {
					return err
				}
				got = 0
			}
			ended = frame.StreamEnded()
		case *xhttp2.SettingsFrame:
			if !frame.IsAck() {
				err = f.WriteSettingsAck()
			}
		case *xhttp2.PingFrame:
			if !frame.IsAck() {
				err = f.WritePing(true, frame.Data)
			}
		case *xhttp2.GoAwayFrame, *xhttp2.RSTStreamFrame:
			return fmt.Errorf("HTTP/2 frame %v", frame)
		}
		if err != nil {
			return err
		}
		if ended {
			m.count.Add(1)
			if err := request(); err != nil {
				return err
			}
		}
	}
}
