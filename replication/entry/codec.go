package entry

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"time"
)

// Limits of the format.
const (
	// BodyBytesMax bounds the body of one payload; capture cuts far below it.
	BodyBytesMax = 64 << 20
	// MessageBytesMax bounds one message of a body. PostgreSQL itself refuses
	// to build one of more than 1 GiB.
	MessageBytesMax = 1<<30 + 64<<10
	// NameBytesMax bounds a schema or sequence name; PostgreSQL as it is
	// shipped has names of up to 63 bytes.
	NameBytesMax = 255
)

const (
	version     = 1
	headerBytes = 88
	sumOffset   = 4
	headOffset  = 8
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// ErrCorrupt is the class of all errors of bytes that are not a payload or a body.
var ErrCorrupt = errors.New("corrupt entry")

func corrupt(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrCorrupt, fmt.Sprintf(format, args...))
}

// Checksum continues the running CRC-32C sum (0 at first) over body.
func Checksum(sum uint32, body []byte) uint32 { return crc32.Update(sum, castagnoli, body) }

func headerChecksum(h []byte) uint32 {
	return crc32.Update(crc32.Checksum(h[:sumOffset], castagnoli), castagnoli, h[headOffset:headerBytes])
}

// EncodedBytes returns how many bytes Append will add.
func (p *Payload) EncodedBytes() int {
	n := headerBytes + len(p.Body)
	if p.Type == TypeMarks {
		n += uvarintLen(uint64(len(p.Marks)))
		for i := range p.Marks {
			s, m := len(p.Marks[i].Schema), len(p.Marks[i].Name)
			n += uvarintLen(uint64(s)) + s + uvarintLen(uint64(m)) + m + 8
		}
	}
	return n
}

// Append appends the encoded payload to dst. Checksum and BodyBytes of anything
// but a commit are those of its body, whatever the header says. It panics if
// the payload breaks a limit that Decode would refuse: an entry nobody can read
// must not be proposed.
func (p *Payload) Append(dst []byte) []byte {
	start := len(dst)
	var h [headerBytes]byte
	dst = append(dst, h[:]...)
	dst = append(dst, p.Body...)
	if p.Type == TypeMarks {
		dst = appendMarks(dst, p.Marks)
	}
	body := dst[start+headerBytes:]
	sum, length := Checksum(0, body), uint64(len(body))
	if p.Type == TypeCommit {
		sum, length = p.Header.Checksum, p.Header.BodyBytes
	}
	if err := p.check(len(body)); err != nil {
		panic(fmt.Sprintf("entry: append: %v", err))
	}
	b := dst[start : start+headerBytes]
	b[0], b[1] = version, byte(p.Type)
	be := binary.BigEndian
	be.PutUint64(b[8:], p.Header.Xid)
	be.PutUint64(b[16:], uint64(p.Header.EndLSN))
	be.PutUint64(b[24:], uint64(p.Header.CommitTime.UnixMicro()))
	copy(b[32:], p.Header.Trace.TraceID[:])
	copy(b[48:], p.Header.Trace.SpanID[:])
	b[56] = p.Header.Trace.Flags
	be.PutUint32(b[60:], p.Header.Changes)
	be.PutUint32(b[64:], sum)
	be.PutUint32(b[68:], p.Fragment)
	be.PutUint64(b[72:], p.Attempt)
	be.PutUint64(b[80:], length)
	be.PutUint32(b[sumOffset:], headerChecksum(b))
	return dst
}

// check holds what both directions demand of a payload with a body of that length.
func (p *Payload) check(bodyBytes int) error {
	if bodyBytes > BodyBytesMax {
		return corrupt("body of %d bytes, more than %d", bodyBytes, BodyBytesMax)
	}
	switch p.Type {
	case TypeTransaction, TypeMarks:
		if p.Attempt != 0 || p.Fragment != 0 {
			return corrupt("attempt %d, fragment %d in a payload of type %d", p.Attempt, p.Fragment, p.Type)
		}
	case TypeFragment:
		if p.Fragment == 0 || bodyBytes == 0 {
			return corrupt("fragment number %d with %d bytes", p.Fragment, bodyBytes)
		}
	case TypeCommit:
		if p.Fragment == 0 || bodyBytes != 0 {
			return corrupt("commit of %d fragments with %d bytes of its own", p.Fragment, bodyBytes)
		}
	default:
		return corrupt("payload type %d", p.Type)
	}
	return nil
}

// Decode decodes a payload and verifies its checksums. The body is not copied.
// An error is ErrCorrupt.
func Decode(b []byte) (Payload, error) {
	if len(b) < headerBytes {
		return Payload{}, corrupt("%d bytes, a header has %d", len(b), headerBytes)
	}
	if b[0] != version {
		return Payload{}, corrupt("version %d, this program reads %d", b[0], version)
	}
	be := binary.BigEndian
	if got, want := headerChecksum(b), be.Uint32(b[sumOffset:]); got != want {
		return Payload{}, corrupt("header checksum %08x, computed %08x", want, got)
	}
	if b[2]|b[3]|b[57]|b[58]|b[59] != 0 {
		return Payload{}, corrupt("reserved bytes are set")
	}
	p := Payload{
		Type: Type(b[1]),
		Header: Header{
			Xid:        be.Uint64(b[8:]),
			EndLSN:     LSN(be.Uint64(b[16:])),
			CommitTime: time.UnixMicro(int64(be.Uint64(b[24:]))).UTC(),
			Trace:      Trace{TraceID: [16]byte(b[32:48]), SpanID: [8]byte(b[48:56]), Flags: b[56]},
			Changes:    be.Uint32(b[60:]),
			Checksum:   be.Uint32(b[64:]),
			BodyBytes:  be.Uint64(b[80:]),
		},
		Fragment: be.Uint32(b[68:]),
		Attempt:  be.Uint64(b[72:]),
	}
	body := b[headerBytes:len(b):len(b)]
	if err := p.check(len(body)); err != nil {
		return Payload{}, err
	}
	if p.Type == TypeCommit {
		return p, nil
	}
	if p.Header.BodyBytes != uint64(len(body)) {
		return Payload{}, corrupt("body of %d bytes, the header says %d", len(body), p.Header.BodyBytes)
	}
	if got := Checksum(0, body); got != p.Header.Checksum {
		return Payload{}, corrupt("body checksum %08x, computed %08x", p.Header.Checksum, got)
	}
	if p.Type == TypeMarks {
		var err error
		p.Marks, err = decodeMarks(body)
		return p, err
	}
	p.Body = body
	return p, nil
}

func appendMarks(dst []byte, marks []Mark) []byte {
	dst = binary.AppendUvarint(dst, uint64(len(marks)))
	for i := range marks {
		m := &marks[i]
		for _, s := range [2]string{m.Schema, m.Name} {
			if len(s) > NameBytesMax {
				panic(fmt.Sprintf("entry: append: name of %d bytes in a mark", len(s)))
			}
			dst = binary.AppendUvarint(dst, uint64(len(s)))
			dst = append(dst, s...)
		}
		dst = binary.BigEndian.AppendUint64(dst, uint64(m.Value))
	}
	return dst
}

func decodeMarks(b []byte) ([]Mark, error) {
	count, b, err := uvarint(b)
	if err != nil {
		return nil, err
	}
	const markBytesMin = 10
	if count > uint64(len(b)/markBytesMin) {
		return nil, corrupt("%d marks in %d bytes", count, len(b))
	}
	marks := make([]Mark, count)
	for i := range marks {
		for _, s := range [2]*string{&marks[i].Schema, &marks[i].Name} {
			var n uint64
			if n, b, err = uvarint(b); err != nil {
				return nil, err
			}
			if n > NameBytesMax || n > uint64(len(b)) {
				return nil, corrupt("name of %d bytes in a mark, %d left", n, len(b))
			}
			*s, b = string(b[:n]), b[n:]
		}
		if len(b) < 8 {
			return nil, corrupt("mark cut short")
		}
		marks[i].Value, b = int64(binary.BigEndian.Uint64(b)), b[8:]
	}
	if len(b) != 0 {
		return nil, corrupt("%d bytes after the last mark", len(b))
	}
	return marks, nil
}

// uvarint reads a varint that must be in its shortest form, so that what was
// decoded encodes to the same bytes.
func uvarint(b []byte) (uint64, []byte, error) {
	n, size := binary.Uvarint(b)
	if size <= 0 || size != uvarintLen(n) {
		return 0, nil, corrupt("bad varint")
	}
	return n, b[size:], nil
}

func uvarintLen(n uint64) int {
	size := 1
	for ; n >= 0x80; n >>= 7 {
		size++
	}
	return size
}
