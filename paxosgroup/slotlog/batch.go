package slotlog

import (
	"bytes"
	"encoding/binary"
)

const (
	batchHeaderBytes = 32
	batchMagic       = 0x51724231
	batchAlign       = 32 // divides a sector, so a batch header never straddles two
	sectorBytes      = 512
)

// batch is what one flush writes to one segment: a header and records.
type batch struct {
	seg       *segment
	offset    int64
	buf       []byte
	records   int
	flush     bool             // somebody rests on it
	callbacks []func(error)    // to be called once it is flushed
	released  map[*segment]int // entries of other segments that it replaces
}

// release notes that n entries of s are no longer needed once b is flushed.
func (b *batch) release(s *segment, n int) {
	if b.released == nil {
		b.released = make(map[*segment]int)
	}
	b.released[s] += n
}

// end returns the offset behind what b holds so far.
func (b *batch) end() int64 { return b.offset + int64(len(b.buf)) }

// seal pads the batch and fills in its header.
func (b *batch) seal(number uint64) {
	for len(b.buf)%batchAlign != 0 {
		b.buf = append(b.buf, 0)
	}
	h := batchHeader{length: uint32(len(b.buf) - batchHeaderBytes), number: number, records: uint32(b.records)}
	// The header's own sector is never zero, so its contents do not matter here.
	b.buf[0] = 1
	h.zeroSectors = uint32(zeroSectors(b.buf, b.offset))
	h.put(b.buf, b.seg.sequence, b.offset)
}

type batchHeader struct {
	length      uint32
	number      uint64
	records     uint32
	zeroSectors uint32
}

func (h batchHeader) put(dst []byte, sequence uint64, offset int64) {
	clear(dst[:batchHeaderBytes])
	binary.LittleEndian.PutUint32(dst[0:], batchMagic)
	binary.LittleEndian.PutUint32(dst[4:], h.length)
	binary.LittleEndian.PutUint64(dst[8:], h.number)
	binary.LittleEndian.PutUint32(dst[16:], h.records)
	binary.LittleEndian.PutUint32(dst[20:], h.zeroSectors)
	binary.LittleEndian.PutUint32(dst[28:], checksum(sequence, offset, dst[:28]))
}

// readBatchHeader reads the header at the start of b, which stands at offset.
func readBatchHeader(b []byte, sequence uint64, offset int64) (batchHeader, bool) {
	if len(b) < batchHeaderBytes || binary.LittleEndian.Uint32(b) != batchMagic ||
		binary.LittleEndian.Uint32(b[28:]) != checksum(sequence, offset, b[:28]) {
		return batchHeader{}, false
	}
	h := batchHeader{
		length:      binary.LittleEndian.Uint32(b[4:]),
		number:      binary.LittleEndian.Uint64(b[8:]),
		records:     binary.LittleEndian.Uint32(b[16:]),
		zeroSectors: binary.LittleEndian.Uint32(b[20:]),
	}
	ok := h.length%batchAlign == 0 && int64(h.length) <= int64(len(b)-batchHeaderBytes)
	return h, ok
}

var zeroSector [sectorBytes]byte

// zeroSectors counts the sectors, whole or in part, that hold only zeros within
// b, which stands at offset. A batch that was cut short by a crash has more of
// them than it was written with; one that rotted has not.
func zeroSectors(b []byte, offset int64) int {
	n := 0
	for len(b) > 0 {
		size := min(len(b), sectorBytes-int(offset%sectorBytes))
		if bytes.Equal(b[:size], zeroSector[:size]) {
			n++
		}
		b = b[size:]
		offset += int64(size)
	}
	return n
}

// isZero reports whether b holds only zeros.
func isZero(b []byte) bool {
	for len(b) > 0 {
		size := min(len(b), sectorBytes)
		if !bytes.Equal(b[:size], zeroSector[:size]) {
			return false
		}
		b = b[size:]
	}
	return true
}
