package capture

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"
	"golang.org/x/sync/errgroup"

	"quorate/replication/entry"
)

// Stream is one replication connection. It ends at the first error; whoever
// wants to go on opens another.
//
// Reading and writing the socket go on at the same time, so the connection is
// taken out of pgconn once the stream has started. pgconn itself would not do:
// its contexts work by deadlines on the connection, which would break off the
// writer along with the reader. Afterwards
//
//   - the read loop alone uses the Frontend, and only Frontend.Receive, which
//     touches its read buffer and its message values;
//   - the write loop alone writes, to the net.Conn and past the Frontend, whose
//     write buffer is left empty and unused;
//   - a net.Conn, of TCP, of a Unix socket and of TLS, may be read and written
//     by two goroutines at a time. The end of the context interrupts the reader
//     by a read deadline, which leaves a write in progress its time.
type Stream struct {
	cfg      Config
	conn     net.Conn
	frontend *pgproto3.Frontend
	decoder  *decoder

	confirmed atomic.Uint64
	reply     atomic.Bool   // the server wants to hear of us
	wake      chan struct{} // capacity 1
	opened    time.Time
	reading   atomic.Int64 // since when (after opened) the read loop waits for the server; 0: it does not
}

// Open connects, and starts the stream where the replication slot stands. Until
// Run the server can send only what the socket's buffers hold. An error of the
// server is a *pgconn.PgError: 42704 if the replication slot does not exist,
// 55006 while another connection uses it.
func Open(ctx context.Context, cfg Config) (*Stream, error) {
	if err := cfg.complete(); err != nil {
		return nil, fmt.Errorf("capture: %w", err)
	}
	cc, err := cfg.connConfig()
	if err != nil {
		return nil, fmt.Errorf("capture: %w", err)
	}
	conn, err := pgconn.ConnectConfig(ctx, cc)
	if err != nil {
		return nil, fmt.Errorf("capture: connect for replication: %w", err)
	}
	s, err := start(ctx, conn, cfg)
	if err != nil {
		closeCtx, cancel := context.WithTimeout(context.Background(), closeTimeout)
		defer cancel()
		conn.Close(closeCtx)
		return nil, fmt.Errorf("capture: %w", err)
	}
	return s, nil
}

func start(ctx context.Context, conn *pgconn.PgConn, cfg Config) (*Stream, error) {
	newest, err := newestXid(ctx, conn)
	if err != nil {
		return nil, err
	}
	err = pglogrepl.StartReplication(ctx, conn, cfg.ReplicationSlot, 0, pglogrepl.StartReplicationOptions{
		Mode: pglogrepl.LogicalReplication,
		PluginArgs: []string{
			"proto_version '1'",
			"publication_names " + quoteLiteral(quoteIdentifier(cfg.Publication)),
			"messages 'true'",
		},
	})
	if err != nil {
		return nil, fmt.Errorf("start replication from %s: %w", cfg.ReplicationSlot, err)
	}
	hijacked, err := conn.Hijack()
	if err != nil {
		return nil, fmt.Errorf("take over the replication connection: %w", err)
	}
	// Attempts must differ between the streams of a database and grow: no
	// stream sends a thousand million large transactions a second.
	attempt := uint64(time.Now().UnixNano())
	decoder := newDecoder(cfg.Handler, cfg.FragmentBytesMax, newest, attempt)
	decoder.authentic = cfg.Authentic
	return &Stream{
		cfg: cfg, conn: hijacked.Conn, frontend: hijacked.Frontend,
		decoder: decoder,
		wake:    make(chan struct{}, 1),
		opened:  time.Now(),
	}, nil
}

// newestXid returns the full transaction id that the server assigns next.
func newestXid(ctx context.Context, conn *pgconn.PgConn) (uint64, error) {
	results, err := conn.Exec(ctx, "SELECT pg_snapshot_xmax(pg_current_snapshot())").ReadAll()
	if err != nil {
		return 0, fmt.Errorf("read the newest transaction id: %w", err)
	}
	if len(results) != 1 || len(results[0].Rows) != 1 || len(results[0].Rows[0]) != 1 {
		return 0, errors.New("read the newest transaction id: not one row")
	}
	xid, err := strconv.ParseUint(string(results[0].Rows[0][0]), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("read the newest transaction id: %w", err)
	}
	return xid, nil
}

func quoteIdentifier(s string) string { return `"` + strings.ReplaceAll(s, `"`, `""`) + `"` }
func quoteLiteral(s string) string    { return `'` + strings.ReplaceAll(s, `'`, `''`) + `'` }

// Confirm tells PostgreSQL that everything which ends at or below lsn is safe:
// it releases the COMMITs that wait for it, and they cannot be held again. A
// position below an earlier one does nothing. It returns at once, and may be
// called from any goroutine at any time.
func (s *Stream) Confirm(lsn entry.LSN) {
	for {
		old := s.confirmed.Load()
		if uint64(lsn) <= old {
			return
		}
		if s.confirmed.CompareAndSwap(old, uint64(lsn)) {
			s.signal()
			return
		}
	}
}

// Confirmed returns the highest position given to Confirm.
func (s *Stream) Confirmed() entry.LSN { return entry.LSN(s.confirmed.Load()) }

func (s *Stream) signal() {
	select {
	case s.wake <- struct{}{}:
	default: // the write loop is on its way to read what we stored
	}
}

// Run receives until the context ends (then it returns nil) or the stream fails
// or the Handler does (then it returns why). It closes the connection, and
// returns when the server has let go of the replication slot or after a bounded
// wait for that. It is called once.
func (s *Stream) Run(ctx context.Context) error {
	g, gctx := errgroup.WithContext(ctx)
	stopWatch := context.AfterFunc(gctx, func() {
		s.conn.SetReadDeadline(time.Unix(1, 0))
		s.conn.SetWriteDeadline(time.Now().Add(closeTimeout)) // a server that does not read must not hold us
	})
	g.Go(func() error { return s.read(gctx) })
	g.Go(func() error { return s.write(gctx) })
	err := g.Wait()
	stopWatch()
	s.Close()
	if ctx.Err() != nil {
		return nil
	}
	return fmt.Errorf("capture: %w", err)
}

// Close ends a stream that is not running. Run does it by itself.
func (s *Stream) Close() {
	s.conn.SetDeadline(time.Now().Add(closeTimeout))
	// CopyDone and Terminate, both without content.
	if _, err := s.conn.Write([]byte{'c', 0, 0, 0, 4, 'X', 0, 0, 0, 4}); err == nil {
		// The server closes its end when the walsender has let go of the slot.
		io.Copy(io.Discard, s.conn)
	}
	s.conn.Close()
}

// read is the way of a commit from the socket to the Handler, in one goroutine.
func (s *Stream) read(ctx context.Context) error {
	for {
		s.reading.Store(int64(time.Since(s.opened)))
		msg, err := s.frontend.Receive()
		s.reading.Store(0)
		if err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			return fmt.Errorf("receive from PostgreSQL: %w", err)
		}
		switch msg := msg.(type) {
		case *pgproto3.CopyData:
			if err := s.receive(ctx, msg.Data); err != nil {
				return err
			}
		case *pgproto3.ErrorResponse:
			return fmt.Errorf("PostgreSQL ended the stream: %w", pgconn.ErrorResponseToPgError(msg))
		case *pgproto3.CopyDone, *pgproto3.CommandComplete:
			return errors.New("PostgreSQL ended the stream: it is shutting down")
		case *pgproto3.NoticeResponse, *pgproto3.ParameterStatus:
		default:
			return fmt.Errorf("unexpected %T in the stream", msg)
		}
	}
}

func (s *Stream) receive(ctx context.Context, data []byte) error {
	if len(data) == 0 {
		return errors.New("empty replication message")
	}
	switch data[0] {
	case 'w': // start and end of WAL, time: what matters of them is in the messages too
		const headerBytes = 25
		if len(data) < headerBytes {
			return errShort
		}
		return s.decoder.message(ctx, data[headerBytes:])
	case 'k':
		if len(data) != 18 {
			return errShort
		}
		if data[17] != 0 {
			s.reply.Store(true)
			s.signal()
		}
		return s.decoder.keepalive(ctx, entry.LSN(binary.BigEndian.Uint64(data[1:])))
	}
	return fmt.Errorf("replication message of type %q", data[0])
}

// confirmPace is the least time from one confirmation to the next.
const confirmPace = 200 * time.Microsecond

// write sends confirmations: at once when there is a new one, and the last one
// again when the server asks or time has passed.
func (s *Stream) write(ctx context.Context) error {
	tick := time.NewTicker(s.cfg.StatusInterval)
	defer tick.Stop()
	var sent uint64
	var last time.Time
	var status [39]byte
	for {
		due, ask := false, false
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-s.wake:
		case <-tick.C:
			due = true
			if since := s.reading.Load(); since != 0 {
				silence := time.Since(s.opened) - time.Duration(since)
				if silence > s.cfg.ReceiveTimeout {
					return fmt.Errorf("PostgreSQL was silent for %s", silence.Round(time.Second))
				}
				ask = silence > s.cfg.ReceiveTimeout/2
			}
		}
		// Under load confirmations come faster than is good for the server, which
		// wakes for each: those of a short while go as one.
		if wait := confirmPace - time.Since(last); wait > 0 && !due {
			time.Sleep(wait)
		}
		due = s.reply.Swap(false) || due
		lsn := s.confirmed.Load()
		if lsn == sent && !due {
			continue
		}
		if _, err := s.conn.Write(appendStatus(status[:0], lsn, time.Now(), ask)); err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			return fmt.Errorf("send status to PostgreSQL: %w", err)
		}
		sent, last = lsn, time.Now()
	}
}

// appendStatus encodes a standby status update in a CopyData. All three
// positions are the same: a client library that fills a zero in, or a server
// that reads a zero as none, finds nothing to interpret.
func appendStatus(dst []byte, lsn uint64, now time.Time, replyRequested bool) []byte {
	dst = append(dst, 'd', 0, 0, 0, 38, 'r')
	for range 3 {
		dst = binary.BigEndian.AppendUint64(dst, lsn)
	}
	dst = binary.BigEndian.AppendUint64(dst, uint64(now.Sub(postgresEpoch).Microseconds()))
	if replyRequested {
		return append(dst, 1)
	}
	return append(dst, 0)
}
