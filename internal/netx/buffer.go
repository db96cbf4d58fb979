package netx

import "sync"

// Buffer is a piece of borrowed memory. The filled part is Bytes; Headroom
// bytes before it stay free, so that a frame header can be put in front
// without a copy.
type Buffer struct {
	mem  []byte
	r, w int
	pool *sync.Pool
}

// Headroom is how many bytes are free before a freshly filled Buffer.
const Headroom = 16

// Size classes of buffers, bytes of payload. Bulk speed follows the bytes moved
// per system call, memory under many slow connections follows the size held
// while writing: so a Source starts small and grows only while reads fill it.
var sizes = [...]int{4 << 10, 16 << 10, 64 << 10, 256 << 10}

const largest = len(sizes) - 1

var pools [len(sizes)]sync.Pool

// Borrow lends a buffer of at least size bytes (at most 256 KiB). Return gives
// it back; using it afterwards is a bug.
func Borrow(size int) *Buffer {
	class := 0
	for class < largest && sizes[class] < size {
		class++
	}
	return borrowClass(class)
}

func borrowClass(class int) *Buffer {
	b, _ := pools[class].Get().(*Buffer)
	if b == nil {
		b = &Buffer{mem: make([]byte, Headroom+sizes[class]), pool: &pools[class]}
	}
	b.r, b.w = Headroom, Headroom
	return b
}

// Return ends the loan.
func (b *Buffer) Return() { b.pool.Put(b) }

// Bytes is the filled part.
func (b *Buffer) Bytes() []byte { return b.mem[b.r:b.w] }

// Free is the part that may still be filled; Grow then counts it in.
func (b *Buffer) Free() []byte { return b.mem[b.w:] }

// Grow marks n more bytes as filled.
func (b *Buffer) Grow(n int) { b.w += n }

// Consume drops n bytes from the front.
func (b *Buffer) Consume(n int) { b.r += n }

// Compact moves the filled part to the front, to make room behind it.
func (b *Buffer) Compact() {
	b.w = Headroom + copy(b.mem[Headroom:], b.mem[b.r:b.w])
	b.r = Headroom
}

// Prepend puts p in front of the filled part, into the headroom.
func (b *Buffer) Prepend(p []byte) {
	b.r -= len(p)
	copy(b.mem[b.r:], p)
}
