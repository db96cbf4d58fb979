package tunnel

import (
	"time"

	"webgw.dev/webgw/internal/netx"
)

// When a session is lost its streams carry on, each on its own connection, but
// the path they share may be gone without a word: TCP alone would need minutes
// to find out. So the connections of lost sessions are watched for as long as
// there are any. Those that make progress, or whose peer is merely slow, stay.
const watchEvery = 250 * time.Millisecond

// watch cuts the connections that orphans returns, those of lost sessions, once
// their peer has been silent for too long. It returns when there are none, or
// quit is closed.
func watch(quit <-chan struct{}, orphans func() []*dataConn) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-quit:
			return
		case <-timer.C:
		}
		start := time.Now()
		all := orphans()
		if len(all) == 0 {
			return
		}
		for _, d := range all {
			if !d.doubted {
				d.doubted = true
				netx.Probe(d.raw)
			}
			if netx.Unheard(d.raw) >= silence {
				d.reset()
			}
		}
		// However many there are, it takes a small part of the time.
		timer.Reset(max(watchEvery, 50*time.Since(start)))
	}
}

// watch starts to watch the streams of sessions that have ended.
func (s *Server) watch() {
	s.smu.Lock()
	defer s.smu.Unlock()
	if !s.closed && !s.watching {
		s.watching = true
		s.lingers.Go(func() { watch(s.quit, s.orphans) })
	}
}

// orphans are the connections with a stream whose session has ended. Without
// any the watch is over.
func (s *Server) orphans() (all []*dataConn) {
	s.smu.Lock()
	defer s.smu.Unlock()
	for d, sess := range s.streams {
		if sess.over() {
			all = append(all, d)
		}
	}
	s.watching = len(all) > 0
	return all
}

func (sess *session) over() bool {
	select {
	case <-sess.done:
		return true
	default:
		return false
	}
}

// orphans are the connections whose session has ended. Without any the watch is
// over.
func (c *Client) orphans() (all []*dataConn) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for d, a := range c.conns {
		if a.over {
			all = append(all, d)
		}
	}
	c.watching = len(all) > 0
	return all
}
