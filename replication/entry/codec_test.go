package entry

import (
	"bytes"
	"errors"
	"reflect"
	"testing"
	"time"
)

func samplePayloads() []Payload {
	body := sampleBody()
	h := Header{
		Xid: 3<<32 | 77, EndLSN: 0x1_0000_0010, CommitTime: time.Date(2026, 5, 4, 3, 2, 1, 123456000, time.UTC),
		Trace:   Trace{TraceID: [16]byte{1, 15: 2}, SpanID: [8]byte{3}, Flags: 1},
		Changes: body.Changes(), Checksum: body.Checksum(), BodyBytes: body.Bytes(),
	}
	marks := []Mark{{Schema: "public", Name: "t_id_seq", Value: -5}, {Schema: "", Name: "x", Value: 1 << 62}}
	return []Payload{
		{Type: TypeTransaction, Header: h, Body: body.Body()},
		{Type: TypeFragment, Header: Header{Xid: 9, Checksum: Checksum(0, []byte("piece")), BodyBytes: 5, CommitTime: time.UnixMicro(0).UTC()}, Attempt: 12, Fragment: 3, Body: []byte("piece")},
		{Type: TypeCommit, Header: h, Attempt: 12, Fragment: 3},
		{Type: TypeMarks, Header: Header{EndLSN: 5}, Marks: marks},
	}
}

func TestPayloadRoundTrip(t *testing.T) {
	for _, p := range samplePayloads() {
		b := p.Append([]byte("before"))
		if !bytes.HasPrefix(b, []byte("before")) || len(b) != 6+p.EncodedBytes() {
			t.Fatalf("type %d: %d bytes appended, EncodedBytes says %d", p.Type, len(b)-6, p.EncodedBytes())
		}
		got, err := Decode(b[6:])
		if err != nil {
			t.Fatalf("type %d: %v", p.Type, err)
		}
		if p.Type == TypeMarks {
			p.Header.Checksum, p.Header.BodyBytes = got.Header.Checksum, got.Header.BodyBytes
		}
		if !reflect.DeepEqual(got, p) {
			t.Fatalf("type %d:\n got %+v\nwant %+v", p.Type, got, p)
		}
	}
}

func TestDecodeRefusesEveryFlippedBit(t *testing.T) {
	for _, p := range samplePayloads() {
		b := p.Append(nil)
		for i := range len(b) * 8 {
			b[i/8] ^= 1 << (i % 8)
			if _, err := Decode(b); !errors.Is(err, ErrCorrupt) {
				t.Fatalf("type %d, bit %d flipped: %v", p.Type, i, err)
			}
			b[i/8] ^= 1 << (i % 8)
		}
		for n := range b {
			if _, err := Decode(b[:n]); !errors.Is(err, ErrCorrupt) {
				t.Fatalf("type %d cut to %d bytes: %v", p.Type, n, err)
			}
		}
	}
}

// resum makes the checksums of a mutated payload right again, so that the
// fuzzer reaches what lies behind them.
func resum(b []byte) {
	if len(b) < headerBytes {
		return
	}
	b[0] = version
	if Type(b[1]) != TypeCommit {
		put32(b[64:], Checksum(0, b[headerBytes:]))
		put64(b[80:], uint64(len(b)-headerBytes))
	}
	put32(b[sumOffset:], headerChecksum(b))
}

func put32(b []byte, v uint32) {
	b[0], b[1], b[2], b[3] = byte(v>>24), byte(v>>16), byte(v>>8), byte(v)
}
func put64(b []byte, v uint64) { put32(b, uint32(v>>32)); put32(b[4:], uint32(v)) }

func FuzzDecode(f *testing.F) {
	for _, p := range samplePayloads() {
		f.Add(p.Append(nil), true)
		f.Add(p.Append(nil), false)
	}
	f.Fuzz(func(t *testing.T, b []byte, mend bool) {
		b = bytes.Clone(b)
		if mend {
			resum(b)
		}
		p, err := Decode(b)
		if err != nil {
			if !errors.Is(err, ErrCorrupt) {
				t.Fatalf("error is not ErrCorrupt: %v", err)
			}
			return
		}
		if got := p.Append(nil); !bytes.Equal(got, b) {
			t.Fatalf("encodes again as %x, was %x", got, b)
		}
		if len(p.Marks) > len(b) {
			t.Fatalf("%d marks out of %d bytes", len(p.Marks), len(b))
		}
		if _, err := Summary(p); err != nil && !errors.Is(err, ErrCorrupt) {
			t.Fatalf("error is not ErrCorrupt: %v", err)
		}
	})
}
