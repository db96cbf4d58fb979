package netx

import (
	"io"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// maxPipes bounds the memory that streams whose receivers are slow may hold in
// pipes. The kernel may allow fewer: an unprivileged user gets 64 of pipeSize.
// Smaller pipes move far less at a time and are worth less than a copy.
const maxPipes = 256

// pipe is borrowed for one move of bytes between two sockets inside the kernel
// (splice(2)) and is empty whenever it lies in the pool.
type pipe struct {
	r, w int
}

var pipes struct {
	sync.Mutex
	idle []*pipe
	made int
	most int // the kernel allows no more; 0: not known yet
}

// borrowPipe returns nil when all pipes are in use: copying is the way then.
func borrowPipe() *pipe {
	pipes.Lock()
	if n := len(pipes.idle); n > 0 {
		p := pipes.idle[n-1]
		pipes.idle = pipes.idle[:n-1]
		pipes.Unlock()
		return p
	}
	if pipes.made >= maxPipes || pipes.most > 0 && pipes.made >= pipes.most {
		pipes.Unlock()
		return nil
	}
	pipes.made++
	pipes.Unlock()
	p, err := newPipe()
	if err != nil {
		pipes.Lock()
		pipes.made--
		if err == unix.EPERM {
			pipes.most = max(pipes.made, 1)
		}
		pipes.Unlock()
		return nil
	}
	return p
}

func newPipe() (*pipe, error) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC|unix.O_NONBLOCK); err != nil {
		return nil, err
	}
	if _, err := unix.FcntlInt(uintptr(fds[0]), unix.F_SETPIPE_SZ, pipeSize); err != nil {
		unix.Close(fds[0])
		unix.Close(fds[1])
		return nil, err
	}
	return &pipe{fds[0], fds[1]}, nil
}

func (p *pipe) giveBack() {
	pipes.Lock()
	pipes.idle = append(pipes.idle, p)
	pipes.Unlock()
}

// discard is giveBack for a pipe that may still hold bytes.
func (p *pipe) discard() {
	unix.Close(p.r)
	unix.Close(p.w)
	pipes.Lock()
	pipes.made--
	pipes.Unlock()
}

// Parcel is a number of bytes of a connection on their way inside the kernel.
// It must be sent at once.
type Parcel struct {
	N    int
	p    *pipe
	lane Lane // left once it is sent, or has to wait
}

// NextParcel waits for bytes and takes up to most of them without copying them
// here. ok is false when that can't be done or isn't worth it now: use Next.
func (s *Source) NextParcel(most int) (parcel Parcel, ok bool, err error) {
	if !s.bulk || s.raw == nil {
		return Parcel{}, false, nil
	}
	var n int
	var p *pipe
	var errno error
	var lane Lane
	err = s.raw.Read(func(fd uintptr) bool {
		if p = borrowPipe(); p == nil {
			return true
		}
		lane = EnterLane()
		for {
			n, errno = splice(int(fd), p.w, min(most, pipeSize))
			if errno != unix.EINTR {
				break
			}
		}
		if errno == unix.EAGAIN {
			lane.Leave()
			p.giveBack() // nothing is held while waiting
			p = nil
			return false
		}
		return true
	})
	switch {
	case err != nil:
	case p == nil:
		s.bulk = false // all pipes are busy
		return Parcel{}, false, nil
	case errno == unix.EINVAL:
		lane.Leave()
		p.giveBack()
		s.bulk, s.noSplice = false, true
		return Parcel{}, false, nil
	case errno != nil:
		err = s.opError(errno.(syscall.Errno))
	case n == 0:
		err = io.EOF
	}
	if err != nil {
		if p != nil {
			lane.Leave()
			p.giveBack()
		}
		return Parcel{}, false, err
	}
	if n < bulkMin && n < most {
		s.bulk = false // not enough at a time: copying is cheaper
	}
	return Parcel{n, p, lane}, true, nil
}

// splice moves up to most bytes from one descriptor to the other, one of which
// is a pipe, and never waits.
func splice(from, to, most int) (int, error) {
	n, err := unix.Splice(from, nil, to, nil, most, unix.SPLICE_F_MOVE|unix.SPLICE_F_NONBLOCK)
	return int(n), err // an int64, on 32-bit machines an int
}

// Send moves the parcel to dst, after header (or nothing), which leaves in the
// same packet.
func (p Parcel) Send(dst syscall.RawConn, header []byte) error {
	left := p.N
	var errno error
	lane, waited := p.lane, false
	err := dst.Write(func(fd uintptr) bool {
		if waited {
			lane = EnterLane()
			waited = false
		}
		for len(header) > 0 {
			var n int
			n, errno = unix.SendmsgN(int(fd), header, nil, nil, unix.MSG_MORE|unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT)
			if errno == unix.EAGAIN {
				lane.Leave()
				waited = true
				return false
			}
			if errno != nil && errno != unix.EINTR {
				return true
			}
			header = header[max(n, 0):]
		}
		for left > 0 {
			var n int
			n, errno = splice(p.p.r, int(fd), left)
			if errno == unix.EAGAIN {
				lane.Leave()
				waited = true
				return false
			}
			if errno != nil && errno != unix.EINTR {
				return true
			}
			left -= max(n, 0)
		}
		errno = nil
		return true
	})
	if err == nil {
		err = errno
	}
	if !waited {
		lane.Leave()
	}
	if left > 0 {
		p.p.discard()
	} else {
		p.p.giveBack()
	}
	return err
}
