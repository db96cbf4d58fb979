package ingress

import (
	"bytes"
	"io"
	"net/http"
	"net/textproto"
	"strconv"
	"strings"
)

// plainAnswer is what a connection to a workload keeps to read answers of the
// usual kind with: all of the head is there, and tells the body's length. All
// others are read by net/http.
type plainAnswer struct {
	res    http.Response
	fields http.Header // only until the head has been passed on
	r      io.Reader
	left   int64 // bytes of the body
}

// plainAnswer takes an answer of the usual kind; nil: it is none, and nothing was
// taken. What it makes of an answer is what net/http would.
func (c *workloadConn) plainAnswer(method string) *http.Response {
	b, err := c.r.Peek(c.r.Buffered())
	if err != nil {
		return nil
	}
	end := bytes.Index(b, []byte("\r\n\r\n"))
	const version = "HTTP/1.1 "
	if end < len(version)+3 || string(b[:len(version)]) != version {
		return nil
	}
	line, rest, _ := strings.Cut(string(b[:end+len(crlf)]), "\r\n")
	status, ok := plainStatus(line[len(version):])
	if !ok {
		return nil
	}
	a := &c.plain
	if a.fields == nil {
		a.fields = http.Header{}
	}
	clear(a.fields)
	length, ends := int64(-1), false
	values := make([]string, 0, strings.Count(rest, "\r\n"))
	for len(rest) > 0 {
		line, rest, _ = strings.Cut(rest, "\r\n")
		name, value, ok := splitField(line)
		if !ok {
			return nil
		}
		name = textproto.CanonicalMIMEHeaderKey(name)
		switch name {
		case "Content-Length":
			n, err := strconv.ParseUint(value, 10, 63)
			if err != nil || length >= 0 || len(value) > maxDigits {
				return nil
			}
			length = int64(n)
		case "Transfer-Encoding", "Trailer", "Upgrade":
			return nil
		case "Connection":
			ends = ends || hasToken(value, "close")
		}
		if others, more := a.fields[name]; more {
			a.fields[name] = append(others, value)
			continue
		}
		values = append(values, value)
		a.fields[name] = values[len(values)-1 : len(values) : len(values)]
	}
	if length < 0 {
		return nil
	}
	c.r.Discard(end + 2*len(crlf)) // it is there
	a.res = http.Response{StatusCode: status, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, Header: a.fields, ContentLength: length, Close: ends, Body: http.NoBody}
	if a.r, a.left = c.r, length; length > 0 && method != http.MethodHead {
		a.res.Body = a
	}
	return &a.res
}

// plainStatus reads a status of a final answer that may have a body.
func plainStatus(s string) (status int, ok bool) {
	if len(s) < 3 || len(s) > 3 && s[3] != ' ' {
		return 0, false
	}
	for i := range 3 {
		if s[i] < '0' || s[i] > '9' {
			return 0, false
		}
		status = 10*status + int(s[i]-'0')
	}
	return status, status >= 200 && status != http.StatusNoContent && status != http.StatusNotModified
}

// Read reads the body.
func (a *plainAnswer) Read(p []byte) (int, error) {
	if a.left == 0 {
		return 0, io.EOF
	}
	n, err := a.r.Read(p[:min(int64(len(p)), a.left)])
	if a.left -= int64(n); err == io.EOF && a.left > 0 {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// Close implements io.Closer; the connection is the exchange's.
func (a *plainAnswer) Close() error { return nil }
