package netx

import (
	"net"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// Lot is where connections wait for bytes without a goroutine: a goroutine's
// stack is most of what an idle connection costs. Waiting here costs more at
// each wake-up, so it is for those that have been quiet for seconds.
type Lot struct {
	file *os.File // an epoll instance, itself waited for like any descriptor
	done chan struct{}

	mu     sync.Mutex
	parked map[uint64]*Parked
	last   uint64
	closed bool
}

// Parked is one wait.
type Parked struct {
	lot    *Lot
	id     uint64
	raw    syscall.RawConn
	resume func()
}

// NewLot opens a lot. The caller must Close it.
func NewLot() (*Lot, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	if err := unix.SetNonblock(fd, true); err != nil { // so that os waits for it with its poller
		unix.Close(fd)
		return nil, os.NewSyscallError("fcntl", err)
	}
	l := &Lot{file: os.NewFile(uintptr(fd), "lot"), done: make(chan struct{}), parked: map[uint64]*Parked{}}
	raw, err := l.file.SyscallConn()
	if err != nil {
		l.file.Close()
		return nil, err
	}
	go l.attend(raw)
	return l, nil
}

// attend resumes who has something to read, until the lot is closed.
func (l *Lot) attend(raw syscall.RawConn) {
	defer close(l.done)
	var events [128]unix.EpollEvent
	for {
		n := 0
		err := raw.Read(func(fd uintptr) bool {
			var err error
			for n, err = unix.EpollWait(int(fd), events[:], 0); err == unix.EINTR; {
				n, err = unix.EpollWait(int(fd), events[:], 0)
			}
			return n > 0
		})
		if err != nil {
			return // closed
		}
		for _, e := range events[:n] {
			l.mu.Lock()
			p := l.parked[uint64(uint32(e.Fd))|uint64(uint32(e.Pad))<<32]
			l.mu.Unlock()
			if p != nil {
				p.Wake()
			}
		}
	}
}

// Park calls resume, once and on a goroutine of its own, as soon as c has bytes
// or an end to read, or Wake is called. Closing c does not wake. It returns nil
// if c can't wait here: resume is not called then.
func (l *Lot) Park(c net.Conn, resume func()) *Parked {
	raw := Raw(c)
	if raw == nil {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil
	}
	l.last++
	p := &Parked{l, l.last, raw, resume}
	e := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLRDHUP | unix.EPOLLONESHOT, Fd: int32(uint32(p.id)), Pad: int32(uint32(p.id >> 32))}
	err := l.control(raw, unix.EPOLL_CTL_ADD, &e)
	if err != nil {
		return nil
	}
	l.parked[p.id] = p
	return p
}

// control changes what the epoll instance, which is open as long as mu is held
// and closed is false, knows of a connection.
func (l *Lot) control(conn syscall.RawConn, op int, e *unix.EpollEvent) error {
	lot, err := l.file.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	err = lot.Control(func(epoll uintptr) {
		err := conn.Control(func(fd uintptr) { failed = unix.EpollCtl(int(epoll), op, int(fd), e) })
		if err != nil {
			failed = err
		}
	})
	if err == nil {
		err = failed
	}
	return err
}

// Wake ends the wait if it lasts.
func (p *Parked) Wake() {
	l := p.lot
	l.mu.Lock()
	_, waits := l.parked[p.id]
	if waits {
		delete(l.parked, p.id)
		l.control(p.raw, unix.EPOLL_CTL_DEL, nil) // an error means that c is closed, which takes it out as well
	}
	l.mu.Unlock()
	if waits {
		go p.resume()
	}
}

// Close wakes all.
func (l *Lot) Close() {
	l.mu.Lock()
	var all []*Parked
	for _, p := range l.parked {
		all = append(all, p)
	}
	l.closed = true
	l.mu.Unlock()
	for _, p := range all {
		p.Wake()
	}
	l.file.Close()
	<-l.done
}
