package world

import (
	"bufio"
	"fmt"
	"io"
	"net/http"
	"testing"
	"time"

	"webgw.dev/webgw"
)

func TestConnectThroughAHiddenNode(t *testing.T) {
	Test(t, func(t *testing.T, w *World) {
		w.Node("home1", BehindNAT).Echo(22)
		w.Gateway("gent")
		const line = "box.example -> home1:22 via gent"
		if err := w.applyWith(line, func(e *webgw.Exposure) { e.Connect = true }); err != nil {
			t.Fatal(err)
		}
		connect := func(host string) (int, io.ReadWriteCloser) {
			c, err := w.Dial("gent", 80)
			if err != nil {
				t.Fatal(err)
			}
			c.SetDeadline(time.Now().Add(10 * time.Second))
			fmt.Fprintf(c, "CONNECT %s HTTP/1.1\r\nHost: %s\r\n\r\n", host, host)
			res, err := http.ReadResponse(bufio.NewReader(c), &http.Request{Method: "CONNECT"})
			if err != nil {
				t.Fatal(err)
			}
			return res.StatusCode, c
		}
		status, c := connect("box.example:22")
		defer c.Close()
		b := make([]byte, 6)
		if _, err := io.WriteString(c, "around"); err != nil || status != 200 {
			t.Fatal(status, err)
		}
		if _, err := io.ReadFull(c, b); err != nil || string(b) != "around" {
			t.Errorf("%q, %v", b, err)
		}
		for _, host := range []string{"home1:22", "127.0.0.1:22", "gent.test:443"} {
			if status, c := connect(host); status != 405 {
				t.Errorf("CONNECT %s: %d", host, status)
			} else {
				c.Close()
			}
		}
		w.Apply(line) // without connect
		if status, c := connect("box.example:22"); status != 405 {
			t.Errorf("after connect was withdrawn: %d", status)
		} else {
			c.Close()
		}
	})
}
