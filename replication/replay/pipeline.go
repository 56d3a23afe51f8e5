package replay

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strconv"

	"github.com/jackc/pgx/v5/pgconn"
)

// pipeline sends statements without waiting for each one's answer. Answers are
// read when many are outstanding, and all of them before anything that depends
// on them. After an error of any method the connection is done for.
type pipeline struct {
	ctx     context.Context
	conn    *pgconn.PgConn
	plans   *planCache
	p       *pgconn.Pipeline // nil when the connection is free for other use
	pending []expectation    // ring would save nothing: it empties at every drain
	read    int              // of pending, already answered
	sent    int              // since the last flush
}

// expectation is what an outstanding answer must be.
type expectation struct {
	prepare bool
	anyRows bool // the number of rows does not matter
	rows    int64
	slot    uint64
	plan    *plan
	want    string
	key     string
}

const (
	flushEvery     = 64  // statements: the server works while more are made
	outstandingMax = 512 // statements
)

func (pl *pipeline) start() {
	if pl.p == nil {
		pl.p = pl.conn.StartPipeline(pl.ctx)
	}
}

// exec sends a prepared statement with parameters in text format.
func (pl *pipeline) exec(st *statement, params [][]byte, want expectation) error {
	pl.start()
	if st.name == "" {
		pl.plans.statements++
		st.name = "replay_" + strconv.Itoa(pl.plans.statements)
		pl.p.SendPrepare(st.name, st.sql, nil)
		prepare := want
		prepare.prepare = true
		pl.pending = append(pl.pending, prepare)
	}
	pl.p.SendQueryPrepared(st.name, params, nil, nil)
	return pl.sentOne(want)
}

// query sends a statement that is not worth preparing.
func (pl *pipeline) query(sql string, params [][]byte, want expectation) error {
	pl.start()
	pl.p.SendQueryParams(sql, params, nil, nil, nil)
	return pl.sentOne(want)
}

func (pl *pipeline) sentOne(want expectation) error {
	pl.pending = append(pl.pending, want)
	pl.sent++
	if pl.sent >= flushEvery {
		pl.sent = 0
		pl.p.SendFlushRequest()
		if err := pl.p.Flush(); err != nil {
			return fmt.Errorf("send: %w", err)
		}
		// The oldest half is answered by now, or nearly.
		if outstanding := len(pl.pending) - pl.read; outstanding > outstandingMax {
			return pl.receive(outstanding / 2)
		}
	}
	return nil
}

// receive reads n answers.
func (pl *pipeline) receive(n int) error {
	for range n {
		want := &pl.pending[pl.read]
		pl.read++
		result, err := pl.p.GetResults()
		if err != nil {
			return pl.refused(want, err)
		}
		rr, ok := result.(*pgconn.ResultReader)
		if !ok {
			if _, ok := result.(*pgconn.StatementDescription); ok && want.prepare {
				continue
			}
			return fmt.Errorf("answer of type %T from the server", result)
		}
		tag, err := rr.Close()
		if err != nil {
			return pl.refused(want, err)
		}
		if !want.anyRows && tag.RowsAffected() != want.rows {
			return &ConflictError{Slot: want.slot, Table: want.plan.target.shown, Key: want.key,
				Want: fmt.Sprintf("%s %d row(s), met %d", want.want, want.rows, tag.RowsAffected())}
		}
	}
	if pl.read == len(pl.pending) {
		pl.pending, pl.read = pl.pending[:0], 0
	}
	return nil
}

func (pl *pipeline) refused(want *expectation, err error) error {
	if !isConflict(err) || want.plan == nil {
		return err
	}
	return &ConflictError{Slot: want.slot, Table: want.plan.target.shown, Key: want.key, Want: fmt.Sprintf("%s %d row(s)", want.want, want.rows), Err: err}
}

// drain waits for all answers and frees the connection for other use.
func (pl *pipeline) drain() error {
	if pl.p == nil {
		return nil
	}
	if err := pl.p.Sync(); err != nil {
		return fmt.Errorf("send: %w", err)
	}
	if err := pl.receive(len(pl.pending) - pl.read); err != nil {
		return err
	}
	result, err := pl.p.GetResults()
	if err != nil {
		return err
	}
	if _, ok := result.(*pgconn.PipelineSync); !ok {
		return errors.New("the server's answers are out of step")
	}
	err = pl.p.Close()
	pl.p, pl.sent = nil, 0
	return err
}

// copyIn sends rows in COPY's text format.
func (pl *pipeline) copyIn(sql string, data []byte, want expectation) error {
	if err := pl.drain(); err != nil {
		return err
	}
	tag, err := pl.conn.CopyFrom(pl.ctx, bytes.NewReader(data), sql)
	if err != nil {
		return pl.refused(&want, err)
	}
	if tag.RowsAffected() != want.rows {
		return &ConflictError{Slot: want.slot, Table: want.plan.target.shown, Want: fmt.Sprintf("%s %d row(s), met %d", want.want, want.rows, tag.RowsAffected())}
	}
	return nil
}
