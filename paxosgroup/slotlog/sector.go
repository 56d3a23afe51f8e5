package slotlog

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
)

// A segment is a file of sectors. Each ends in a stamp that says which segment
// wrote it, so that in a file which is used again a sector that was never
// written is told from one that rotted. Everything else counts in the bytes
// between the stamps: an offset is one of those.
const (
	sectorBytes = 512
	stampBytes  = 4
	sectorData  = sectorBytes - stampBytes
)

// position returns where in the file the byte at offset is.
func position(offset int64) int64 { return offset/sectorData*sectorBytes + offset%sectorData }

// capacity returns how many bytes a file of the given size holds.
func capacity(size int64) int64 { return size / sectorBytes * sectorData }

// stamp returns that of the sector with the given number: 16 bits of the
// sequence, 16 that show when one of them has changed.
func stamp(sequence uint64, sector int64) uint32 {
	return uint32(uint16(sequence))<<16 | uint32(stampCheck(uint16(sequence), sector))
}

func stampCheck(sequence uint16, sector int64) uint16 {
	crc := checksumNumber(checksumNumber(1, uint64(sequence)), uint64(sector))
	return uint16(crc>>16) ^ uint16(crc) | 1 // never zero, which is no stamp
}

// appendStamped appends b, which stands at offset, a sector's first, as it is
// on the disk: with stamps, the last sector filled up with zeros.
func appendStamped(dst, b []byte, sequence uint64, offset int64) []byte {
	for sector := offset / sectorData; len(b) > 0; sector++ {
		n := min(len(b), sectorData)
		dst = append(dst, b[:n]...)
		if n < sectorData {
			dst = append(dst, zeroSector[:sectorData-n]...)
		}
		dst = binary.LittleEndian.AppendUint32(dst, stamp(sequence, sector))
		b = b[n:]
	}
	return dst
}

// strip takes the stamps out of b, in place, which stands in its file at
// position, and returns what is left.
func strip(b []byte, position int64) []byte {
	out := b[:0]
	for len(b) > 0 {
		rest := int(sectorBytes - position%sectorBytes) // of the sector
		n := min(len(b), rest)
		out = append(out, b[:min(n, max(0, rest-stampBytes))]...)
		b = b[n:]
		position += int64(n)
	}
	return out
}

// The states of a sector.
type sectorState uint8

const (
	sectorWritten sectorState = iota // by this segment
	sectorOld                        // by an earlier one, or by none
	sectorRotten                     // what nobody wrote
)

// stateOf looks at a sector's stamp; what is in it may yet be damaged.
func stateOf(b []byte, sequence uint64, sector int64) sectorState {
	got := binary.LittleEndian.Uint32(b[sectorData:])
	switch {
	case got == stamp(sequence, sector):
		return sectorWritten
	case got == 0 && bytes.Equal(b[:sectorBytes], zeroSector[:]):
		return sectorOld
	case got != 0 && uint16(got) == stampCheck(uint16(got>>16), sector):
		return sectorOld
	}
	return sectorRotten
}

var zeroSector [sectorBytes]byte

// isZero reports whether b holds only zeros.
func isZero(b []byte) bool {
	for len(b) > 0 {
		n := min(len(b), sectorBytes)
		if !bytes.Equal(b[:n], zeroSector[:n]) {
			return false
		}
		b = b[n:]
	}
	return true
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// checksum covers where the bytes belong, so that a block written to the wrong
// place, or left over from another life of the file, does not pass.
func checksum(sequence uint64, offset int64, parts ...[]byte) uint32 {
	crc := checksumNumber(checksumNumber(0, sequence), uint64(offset))
	for _, p := range parts {
		crc = crc32.Update(crc, castagnoli, p)
	}
	return crc
}

// checksumNumber goes on with crc over the little-endian bytes of v. An array of
// them, handed to crc32.Update, would be allocated each time.
func checksumNumber(crc uint32, v uint64) uint32 {
	crc = ^crc
	for range 8 {
		crc = castagnoli[byte(crc)^byte(v)] ^ crc>>8
		v >>= 8
	}
	return ^crc
}
