package sequence

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

const (
	// lockTimeout bounds what a sample waits for a locked sequence.
	lockTimeout = 5 * time.Millisecond
	// lockedSteps is how far ahead of the last reading a locked sequence is
	// taken to be: what a session may have drawn between that reading and the lock.
	lockedSteps = 10_000_000
	// chunk is how many sequences one statement reads; each takes a lock.
	chunk = 200
)

// Sampler reads all sequences of a database over a connection that it alone
// uses. It is not safe for concurrent use.
type Sampler struct {
	conn    *pgconn.PgConn
	known   []definition
	reads   []string         // names of prepared statements, a chunk of known each
	prepare int              // counts prepared statements, so that names are new
	last    map[uint32]State // what was read last, by OID
}

// definition is what the catalogs say of a sequence.
type definition struct {
	OID          uint32
	Schema, Name string
	Start        int64
	Increment    int64
	Min, Max     int64
}

const listStatement = "quorate_sequences"

// Sequences of the system and of ourselves hand out nothing to users, and
// temporary ones end with their session.
const listQuery = `SELECT c.oid, n.nspname, c.relname, s.seqstart, s.seqincrement, s.seqmin, s.seqmax
FROM pg_catalog.pg_sequence s
JOIN pg_catalog.pg_class c ON c.oid = s.seqrelid
JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace
WHERE c.relpersistence <> 't' AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'quorate')
ORDER BY c.oid`

// NewSampler prepares sampling on conn, which is the Sampler's from now on.
func NewSampler(ctx context.Context, conn *pgx.Conn) (*Sampler, error) {
	for _, setting := range []string{
		fmt.Sprintf("SET lock_timeout = '%dms'", lockTimeout.Milliseconds()),
		"SET synchronous_commit = off", // it must never wait for itself
		"SET default_transaction_read_only = on",
	} {
		if _, err := conn.Exec(ctx, setting); err != nil {
			return nil, fmt.Errorf("set up sequence sampling: %w", err)
		}
	}
	s := &Sampler{conn: conn.PgConn(), last: make(map[uint32]State)}
	if _, err := s.conn.Prepare(ctx, listStatement, listQuery, nil); err != nil {
		return nil, fmt.Errorf("prepare sequence sampling: %w", err)
	}
	// Not only for the first sample's sake: the catalogs are in this session's
	// caches before anybody can lock them.
	if _, err := s.Sample(ctx); err != nil {
		return nil, err
	}
	return s, nil
}

// Sample reads every sequence, in one round trip while their set does not
// change. What was handed out before the call began is in it. An error means
// that the connection is of no more use.
func (s *Sampler) Sample(ctx context.Context) (Sample, error) {
	const attemptsMax = 5 // each time somebody created, dropped or renamed one meanwhile
	for range attemptsMax {
		at := time.Now()
		list, states, err := s.attempt(ctx)
		if err != nil {
			return Sample{}, fmt.Errorf("sample sequences: %w", err)
		}
		if list != nil && !slices.Equal(list, s.known) {
			if err := s.adopt(ctx, list); err != nil {
				return Sample{}, fmt.Errorf("sample sequences: %w", err)
			}
			continue
		}
		if states == nil {
			continue
		}
		clear(s.last)
		for i := range states {
			s.last[states[i].OID] = states[i]
		}
		return Sample{At: at, States: states}, nil
	}
	// The set of sequences does not come to rest: one at a time, then, over
	// what it was last. The next sample sees what is new.
	at := time.Now()
	states := make([]State, 0, len(s.known))
	for i := range s.known {
		state, exists, err := s.readOne(ctx, &s.known[i])
		if err != nil {
			return Sample{}, fmt.Errorf("sample sequences: %w", err)
		}
		if exists {
			states = append(states, state)
		}
	}
	return Sample{At: at, States: states}, nil
}

// attempt lists the sequences and reads the known ones. The list is nil when
// somebody holds the catalogs; then the known set has to do. The states are nil
// when one of the known is gone.
func (s *Sampler) attempt(ctx context.Context) (list []definition, states []State, err error) {
	p := s.conn.StartPipeline(ctx)
	p.SendQueryPrepared(listStatement, nil, nil, nil)
	// Each statement ends its own transaction, so that one that fails on a lock
	// takes no other with it.
	p.SendPipelineSync()
	for _, read := range s.reads {
		p.SendQueryPrepared(read, nil, nil, nil)
		p.SendPipelineSync()
	}
	if err := p.Flush(); err != nil {
		p.Close()
		return nil, nil, err
	}
	rows, err := results(p)
	switch {
	case locked(err):
	case err != nil:
		p.Close()
		return nil, nil, err
	default:
		list = make([]definition, 0, len(rows))
		for _, row := range rows {
			d, err := parseDefinition(row)
			if err != nil {
				p.Close()
				return nil, nil, err
			}
			list = append(list, d)
		}
	}
	states = make([]State, 0, len(s.known))
	var again []int // chunks with a locked sequence
	gone := false
	for i := range s.reads {
		rows, err := results(p)
		known := s.known[i*chunk : min((i+1)*chunk, len(s.known))]
		switch {
		case locked(err):
			again = append(again, i)
			continue
		case err != nil && pgCode(err) != "":
			gone = true
			continue
		case err != nil:
			p.Close()
			return nil, nil, err
		}
		if len(rows) != len(known) {
			p.Close()
			return nil, nil, fmt.Errorf("%d sequences read, %d asked for", len(rows), len(known))
		}
		for _, row := range rows {
			state, err := parseState(known, row)
			if err != nil {
				p.Close()
				return nil, nil, err
			}
			states = append(states, state)
		}
	}
	if err := p.Close(); err != nil {
		return nil, nil, err
	}
	for _, i := range again {
		for j := i * chunk; j < min((i+1)*chunk, len(s.known)); j++ {
			state, exists, err := s.readOne(ctx, &s.known[j])
			if err != nil {
				return nil, nil, err
			}
			if !exists {
				gone = true
				continue
			}
			states = append(states, state)
		}
	}
	if gone {
		states = nil
	}
	return list, states, nil
}

// readOne reads one sequence, or bounds it if it is locked.
func (s *Sampler) readOne(ctx context.Context, d *definition) (State, bool, error) {
	results, err := s.conn.Exec(ctx, readQuery([]definition{*d})).ReadAll()
	switch {
	case locked(err):
		return s.bound(d), true, nil
	case pgCode(err) != "":
		return State{}, false, nil
	case err != nil:
		return State{}, false, err
	}
	if len(results) != 1 || len(results[0].Rows) != 1 {
		return State{}, false, fmt.Errorf("sequence %q.%q has not one row", d.Schema, d.Name)
	}
	state, err := parseState([]definition{*d}, results[0].Rows[0])
	return state, true, err
}

// bound answers for a sequence that cannot be read.
func (s *Sampler) bound(d *definition) State {
	state, ok := s.last[d.OID]
	if !ok {
		state = d.state()
		state.LastValue = d.Start
	}
	state.Schema, state.Name = d.Schema, d.Name
	if !state.Locked { // or else the bound would run away while it stays locked
		state.Locked, state.Called = true, true
		state.LastValue = state.ahead(state.reach(), lockedSteps)
		state.LogCount = 0
	}
	return state
}

// adopt makes list the known set and prepares reading it.
func (s *Sampler) adopt(ctx context.Context, list []definition) error {
	for _, read := range s.reads {
		if err := s.conn.Deallocate(ctx, read); err != nil {
			return err
		}
	}
	s.known, s.reads = list, nil
	for part := range slices.Chunk(list, chunk) {
		s.prepare++
		read := fmt.Sprintf("quorate_read_%d", s.prepare)
		if _, err := s.conn.Prepare(ctx, read, readQuery(part), nil); err != nil {
			if code := pgCode(err); code == "" {
				return err
			}
			// Dropped or locked since it was listed. Known as it is, but without
			// statements, the set is listed anew.
			s.known, s.reads = nil, nil
			return s.forget(ctx)
		}
		s.reads = append(s.reads, read)
	}
	return nil
}

// forget drops the statements that a set given up has left behind.
func (s *Sampler) forget(ctx context.Context) error {
	if _, err := s.conn.Exec(ctx, "DEALLOCATE ALL").ReadAll(); err != nil {
		return err
	}
	_, err := s.conn.Prepare(ctx, listStatement, listQuery, nil)
	return err
}

func readQuery(defs []definition) string {
	var q strings.Builder
	for i := range defs {
		if i > 0 {
			q.WriteString(" UNION ALL ")
		}
		fmt.Fprintf(&q, "SELECT %d, last_value, log_cnt, is_called FROM %s", i, pgx.Identifier{defs[i].Schema, defs[i].Name}.Sanitize())
	}
	return q.String()
}

func (d *definition) state() State {
	return State{OID: d.OID, Schema: d.Schema, Name: d.Name, Increment: d.Increment, Min: d.Min, Max: d.Max}
}

// results reads the rows of one statement of a pipeline and the sync after it.
func results(p *pgconn.Pipeline) (rows [][][]byte, err error) {
	for {
		r, e := p.GetResults()
		if e != nil {
			if pgCode(e) == "" {
				return nil, e
			}
			err = e
			continue
		}
		switch r := r.(type) {
		case *pgconn.ResultReader:
			result := r.Read()
			if result.Err != nil {
				err = result.Err
				continue
			}
			rows = result.Rows
		case *pgconn.PipelineSync:
			return rows, err
		default:
			return nil, fmt.Errorf("unexpected %T in the answer", r)
		}
	}
}

func parseDefinition(row [][]byte) (definition, error) {
	d := definition{Schema: string(row[1]), Name: string(row[2])}
	oid, err := strconv.ParseUint(string(row[0]), 10, 32)
	errs := []error{err}
	d.OID = uint32(oid)
	for i, v := range []*int64{&d.Start, &d.Increment, &d.Min, &d.Max} {
		*v, err = strconv.ParseInt(string(row[3+i]), 10, 64)
		errs = append(errs, err)
	}
	return d, errors.Join(errs...)
}

func parseState(known []definition, row [][]byte) (State, error) {
	i, err := strconv.Atoi(string(row[0]))
	if err != nil || i < 0 || i >= len(known) {
		return State{}, fmt.Errorf("sequence number %q", row[0])
	}
	s := known[i].state()
	var e1, e2 error
	s.LastValue, e1 = strconv.ParseInt(string(row[1]), 10, 64)
	s.LogCount, e2 = strconv.ParseInt(string(row[2]), 10, 64)
	s.Called = string(row[3]) == "t"
	return s, errors.Join(e1, e2)
}

func pgCode(err error) string {
	var e *pgconn.PgError
	if errors.As(err, &e) {
		return e.Code
	}
	return ""
}

// locked reports whether a statement gave up on a lock.
func locked(err error) bool { return pgCode(err) == "55P03" }
