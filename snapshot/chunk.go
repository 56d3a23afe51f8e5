package snapshot

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"

	"github.com/klauspost/compress/s2"

	"quorate/snapshot/snapshotpb"
)

// ChunkBytes is how much of a part a chunk holds, before compression.
const ChunkBytes = 1 << 20

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// ErrCorrupt is the class of errors of chunks that did not arrive as they were sent.
var ErrCorrupt = errors.New("corrupt snapshot chunk")

func checksum(part uint32, index uint64, raw []byte) uint32 {
	var place [16]byte
	binary.LittleEndian.PutUint64(place[:], uint64(part))
	binary.LittleEndian.PutUint64(place[8:], index)
	return crc32.Update(crc32.Checksum(place[:], castagnoli), castagnoli, raw)
}

// chunkWriter cuts what is written to it into chunks.
type chunkWriter struct {
	part  uint32
	send  func(*snapshotpb.Chunk) error
	raw   []byte
	index uint64
	total uint64
}

func (w *chunkWriter) Write(p []byte) (int, error) {
	n := len(p)
	for len(p) > 0 {
		if w.raw == nil {
			w.raw = make([]byte, 0, ChunkBytes)
		}
		take := min(len(p), ChunkBytes-len(w.raw))
		w.raw = append(w.raw, p[:take]...)
		p = p[take:]
		if len(w.raw) == ChunkBytes {
			if err := w.flush(); err != nil {
				return 0, err
			}
		}
	}
	return n, nil
}

func (w *chunkWriter) flush() error {
	if len(w.raw) == 0 {
		return nil
	}
	c := &snapshotpb.Chunk{Index: w.index, RawBytes: uint32(len(w.raw)), Checksum: checksum(w.part, w.index, w.raw), Codec: snapshotpb.Codec_S2}
	// A new buffer each time: gRPC may still hold the last one.
	c.Data = s2.Encode(nil, w.raw)
	if len(c.Data) >= len(w.raw) {
		c.Codec, c.Data = snapshotpb.Codec_NONE, append([]byte(nil), w.raw...)
	}
	w.index++
	w.total += uint64(len(w.raw))
	w.raw = w.raw[:0]
	return w.send(c)
}

// close sends what is left and the end of the part.
func (w *chunkWriter) close(rows uint64) error {
	if err := w.flush(); err != nil {
		return err
	}
	return w.send(&snapshotpb.Chunk{Index: w.index, Last: true, Rows: rows, TotalBytes: w.total, Checksum: checksum(w.part, w.index, nil)})
}

// chunkReader puts the chunks of a part together again. It ends with io.EOF only
// when all of the part has come and is what was sent; rows is known then.
type chunkReader struct {
	part  uint32
	recv  func() (*snapshotpb.Chunk, error)
	buf   []byte
	rest  []byte
	index uint64
	total uint64
	rows  uint64
	ended bool
}

func (r *chunkReader) Read(p []byte) (int, error) {
	for len(r.rest) == 0 {
		if r.ended {
			return 0, io.EOF
		}
		if err := r.next(); err != nil {
			return 0, err
		}
	}
	n := copy(p, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}

func (r *chunkReader) next() error {
	c, err := r.recv()
	if err == io.EOF {
		return fmt.Errorf("%w: part %d ends after %d chunks without its end", ErrCorrupt, r.part, r.index)
	}
	if err != nil {
		return err
	}
	if c.Index != r.index {
		return fmt.Errorf("%w: part %d: chunk %d where %d was due", ErrCorrupt, r.part, c.Index, r.index)
	}
	if c.RawBytes > ChunkBytes {
		return fmt.Errorf("%w: part %d, chunk %d: of %d bytes", ErrCorrupt, r.part, c.Index, c.RawBytes)
	}
	raw := c.Data
	switch c.Codec {
	case snapshotpb.Codec_NONE:
	case snapshotpb.Codec_S2:
		if n, err := s2.DecodedLen(c.Data); err != nil || n != int(c.RawBytes) {
			return fmt.Errorf("%w: part %d, chunk %d: bad compressed length", ErrCorrupt, r.part, c.Index)
		}
		if r.buf == nil {
			r.buf = make([]byte, ChunkBytes)
		}
		if raw, err = s2.Decode(r.buf[:c.RawBytes], c.Data); err != nil {
			return fmt.Errorf("%w: part %d, chunk %d: %v", ErrCorrupt, r.part, c.Index, err)
		}
	default:
		return fmt.Errorf("%w: part %d, chunk %d: unknown codec %v", ErrCorrupt, r.part, c.Index, c.Codec)
	}
	if got := checksum(r.part, r.index, raw); got != c.Checksum {
		return fmt.Errorf("%w: part %d, chunk %d: checksum %08x, computed %08x", ErrCorrupt, r.part, c.Index, c.Checksum, got)
	}
	if c.Last {
		if c.TotalBytes != r.total || len(raw) != 0 {
			return fmt.Errorf("%w: part %d: %d bytes arrived of %d", ErrCorrupt, r.part, r.total, c.TotalBytes)
		}
		r.rows, r.ended = c.Rows, true
		return nil
	}
	if len(raw) == 0 {
		return fmt.Errorf("%w: part %d, chunk %d is empty", ErrCorrupt, r.part, c.Index)
	}
	r.rest = raw
	r.index++
	r.total += uint64(len(raw))
	return nil
}
