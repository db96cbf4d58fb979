//go:build linux

package main

import (
	"bufio"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"strconv"
	"strings"
	"syscall"
)

// sinkPorts is where the workloads listen.
type sinkPorts struct{ Raw, HTTP, UDP string }

// What a visitor of the raw workload asks for, in its first byte after a TLS
// record that is skipped if there is one.
const (
	askDown  = 'D' // send without end
	askUp    = 'U' // discard what comes
	askPing  = 'P' // answer each question
	askOnce  = 'N' // answer one question and close
	question = 64  // bytes
	reply    = 128 // bytes

	tlsHandshake = 0x16
	largeBody    = 64 << 20
)

// zeros is what bulk is made of: a buffer small enough to stay in the
// processor's cache, written as ordinary programs write. (sendfile from memory
// was tried and is no better a workload: it fills sockets with pieces of one
// page, which slows splice down and nothing else.)
var zeros [256 << 10]byte

// send sends n zeros to c, or without end if n < 0, and tells each portion.
func send(c net.Conn, n int, sent func(int)) error {
	for n != 0 {
		p := zeros[:]
		if n > 0 {
			p = p[:min(n, len(p))]
			n -= len(p)
		}
		if _, err := c.Write(p); err != nil {
			return err
		}
		if sent != nil {
			sent(len(p))
		}
	}
	return nil
}

// dropped is where received bytes would go if they were copied.
var dropped [1 << 20]byte

// discard drops n bytes that c receives, or all if n < 0, without copying
// them, and tells each portion. The end comes as io.EOF.
func discard(c *net.TCPConn, n int, got func(int)) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	for n != 0 {
		p := dropped[:]
		if n > 0 {
			p = p[:min(n, len(p))]
		}
		var done int
		var errno error
		err := raw.Read(func(fd uintptr) bool {
			done, _, errno = syscall.Recvfrom(int(fd), p, syscall.MSG_TRUNC)
			return errno != syscall.EAGAIN
		})
		if err = errors.Join(err, errno); err != nil {
			return err
		}
		if done == 0 {
			return io.EOF
		}
		if n > 0 {
			n -= done
		}
		if got != nil {
			got(done)
		}
	}
	return nil
}

// serveSinks serves the workloads until the process ends.
func serveSinks() (sinkPorts, error) {
	serve := func(handle func(*net.TCPConn) error) (string, error) {
		return listen(func(c *net.TCPConn) {
			defer c.Close()
			handle(c) // an error means that the visitor has gone, as they do
		})
	}
	raw, err := serve(rawSink)
	if err != nil {
		return sinkPorts{}, err
	}
	http, err := serve(httpSink)
	if err != nil {
		return sinkPorts{}, err
	}
	echo, err := listenUDP()
	if err != nil {
		return sinkPorts{}, err
	}
	go echoSink(echo)
	return sinkPorts{raw, http, echo.LocalAddr().String()}, nil
}

// listen serves connections on a free port of the loopback until the process
// ends.
func listen(handle func(*net.TCPConn)) (addr string, err error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				panic(err) // too few descriptors: no measure is worth anything then
			}
			go handle(c.(*net.TCPConn))
		}
	}()
	return l.Addr().String(), nil
}

func rawSink(c *net.TCPConn) error {
	r := bufio.NewReaderSize(c, 4096)
	b, err := r.Peek(1)
	if err != nil {
		return err
	}
	if b[0] == tlsHandshake {
		h, err := r.Peek(5)
		if err != nil {
			return err
		}
		if _, err := r.Discard(5 + int(binary.BigEndian.Uint16(h[3:]))); err != nil {
			return err
		}
	}
	ask, err := r.ReadByte()
	if err != nil {
		return err
	}
	switch ask {
	case askDown:
		return send(c, -1, nil)
	case askUp:
		return discard(c, -1, nil)
	}
	p := make([]byte, reply)
	for {
		if _, err := io.ReadFull(r, p[:question]); err != nil {
			return err
		}
		if _, err := c.Write(p); err != nil || ask == askOnce {
			return err
		}
	}
}

// httpSink speaks as much HTTP/1.1 as the measures need, so that little of the
// processor goes into it.
func httpSink(c *net.TCPConn) error {
	small := []byte("HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: " + strconv.Itoa(reply) + "\r\n\r\n" + strings.Repeat("x", reply))
	large := []byte("HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nContent-Length: " + strconv.Itoa(largeBody) + "\r\n\r\n")
	r := bufio.NewReaderSize(c, 8192)
	for {
		first, length, closing, err := readHead(r)
		if err != nil {
			return err
		}
		buffered := min(length, r.Buffered())
		if _, err := r.Discard(buffered); err != nil {
			return err
		}
		if err := discard(c, length-buffered, nil); err != nil {
			return err
		}
		if strings.HasPrefix(first, "GET /large ") {
			if _, err := c.Write(large); err != nil {
				return err
			}
			err = send(c, largeBody, nil)
		} else {
			_, err = c.Write(small)
		}
		if err != nil || closing {
			return err
		}
	}
}

// readHead reads the head of an HTTP/1.1 message: its first line, the length
// of its body, and whether the connection ends with it.
func readHead(r *bufio.Reader) (first string, length int, closing bool, err error) {
	for {
		line, err := r.ReadSlice('\n')
		if err != nil {
			return first, 0, false, err
		}
		switch name, value, _ := strings.Cut(strings.TrimRight(string(line), "\r\n"), ":"); {
		case first == "":
			first = string(line)
		case name == "":
			return first, length, closing, nil
		case strings.EqualFold(name, "Content-Length"):
			if length, err = strconv.Atoi(strings.TrimSpace(value)); err != nil {
				return first, 0, false, err
			}
		case strings.EqualFold(name, "Transfer-Encoding"):
			return first, 0, false, errors.New("a body without a length")
		case strings.EqualFold(name, "Connection"):
			closing = strings.EqualFold(strings.TrimSpace(value), "close")
		}
	}
}
