package slotlog

import "encoding/binary"

const (
	batchHeaderBytes = 24
	batchMagic       = 0x32724251
)

// batch is what one flush writes to one segment: a header and records. It begins
// with a sector, so no write touches a sector that others rest on.
type batch struct {
	seg       *segment
	offset    int64
	buf       []byte
	records   int
	flush     bool               // somebody rests on it
	callbacks []func(error)      // to be called once it is flushed
	released  map[*segment]int64 // bytes of records that it replaces
}

// release notes that n bytes of s are no longer needed once b is flushed.
func (b *batch) release(s *segment, n int64) {
	if b.released == nil {
		b.released = make(map[*segment]int64)
	}
	b.released[s] += n
}

// end returns the offset behind what b holds so far.
func (b *batch) end() int64 { return b.offset + int64(len(b.buf)) }

// seal fills in the header.
func (b *batch) seal(number uint64) {
	h := batchHeader{length: uint32(len(b.buf) - batchHeaderBytes), number: number, records: uint32(b.records)}
	h.put(b.buf, b.seg.sequence, b.offset)
}

type batchHeader struct {
	length  uint32
	number  uint64
	records uint32
}

func (h batchHeader) put(dst []byte, sequence uint64, offset int64) {
	binary.LittleEndian.PutUint32(dst[0:], batchMagic)
	binary.LittleEndian.PutUint32(dst[4:], h.length)
	binary.LittleEndian.PutUint64(dst[8:], h.number)
	binary.LittleEndian.PutUint32(dst[16:], h.records)
	binary.LittleEndian.PutUint32(dst[20:], checksum(sequence, offset, dst[:20]))
}

// readBatchHeader reads the header at the start of b, which stands at offset.
func readBatchHeader(b []byte, sequence uint64, offset int64) (batchHeader, bool) {
	if len(b) < batchHeaderBytes || binary.LittleEndian.Uint32(b) != batchMagic ||
		binary.LittleEndian.Uint32(b[20:]) != checksum(sequence, offset, b[:20]) {
		return batchHeader{}, false
	}
	h := batchHeader{
		length:  binary.LittleEndian.Uint32(b[4:]),
		number:  binary.LittleEndian.Uint64(b[8:]),
		records: binary.LittleEndian.Uint32(b[16:]),
	}
	return h, int64(h.length) <= int64(len(b)-batchHeaderBytes)
}

// nextSector returns the first offset at or behind offset that begins a sector.
func nextSector(offset int64) int64 { return (offset + sectorData - 1) / sectorData * sectorData }
