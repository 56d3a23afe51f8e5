package replay

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5/pgconn"

	"quorate/replication/entry"
)

// Transaction is what one slot does.
type Transaction struct {
	Slot       uint64
	CommitTime time.Time     // the publisher's; zero: the payload's
	Payload    entry.Payload // zero: a slot that changes nothing
	// Fragments yields the bodies that went before a Commit, in order. It may be
	// called more than once, and yield's body may be reused after yield returns.
	Fragments func(yield func(body []byte) error) error
}

// Apply applies the batch, whose slots ascend and are above Applied, as one
// PostgreSQL transaction, and returns when it is committed and visible. Where
// another session's locks stand in the way it begins again in a new connection,
// until the context ends. After any error the session is closed and the outcome
// is what Progress of a new session says.
func (s *Session) Apply(ctx context.Context, batch []Transaction) error {
	return s.apply(ctx, batch, false)
}

// ForceProgress is Apply, except that progress moves to the last slot even if
// the batch writes nothing. It costs a commit record.
func (s *Session) ForceProgress(ctx context.Context, batch []Transaction) error {
	return s.apply(ctx, batch, true)
}

func (s *Session) apply(ctx context.Context, batch []Transaction, force bool) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conn == nil {
		return ErrClosed
	}
	if len(batch) == 0 {
		return nil
	}
	at := s.applied.Load()
	for i := range batch {
		if batch[i].Slot <= at {
			panic(fmt.Sprintf("replay: slot %d handed over after slot %d", batch[i].Slot, at))
		}
		at = batch[i].Slot
	}
	stopWatching := s.watchBlockers(ctx)
	defer stopWatching()
	rowByRow := false
	for attempt := 0; ; attempt++ {
		wrote, err := s.try(ctx, batch, force, rowByRow)
		if err == nil {
			if wrote {
				s.progress.Store(at)
			}
			s.applied.Store(at)
			return nil
		}
		s.drop()
		var conflict *ConflictError
		switch {
		case ctx.Err() != nil:
			return fmt.Errorf("replay slots %d to %d: %w", batch[0].Slot, at, err)
		case isLockConflict(err):
			s.retries.Add(1)
			s.cfg.Logger.Info("replay waits for a lock", "slot", batch[0].Slot, "attempt", attempt+1, "error", err)
			if err := s.pause(ctx, attempt); err != nil {
				return fmt.Errorf("replay slots %d to %d: %w", batch[0].Slot, at, err)
			}
		case !rowByRow && (isConflict(err) || errors.As(err, &conflict)):
			// Which row of which slot it was shows when each goes alone.
			s.retries.Add(1)
			rowByRow = true
		default:
			return fmt.Errorf("replay slots %d to %d: %w", batch[0].Slot, at, err)
		}
		progress, err := s.connect(ctx)
		if err != nil {
			return fmt.Errorf("replay slots %d to %d: %w", batch[0].Slot, at, err)
		}
		if want := s.progress.Load(); progress != want {
			s.drop()
			return fmt.Errorf("replay slots %d to %d: progress of origin %q is %d, not %d: somebody else moved it", batch[0].Slot, at, s.cfg.Origin, progress, want)
		}
	}
}

// pause gives those who queued behind our lock request a turn.
func (s *Session) pause(ctx context.Context, attempt int) error {
	if s.promoting.Load() {
		return nil
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(min(time.Second, 20*time.Millisecond<<min(attempt, 10))):
		return nil
	}
}

// try applies the batch once. It reports whether it wrote anything.
func (s *Session) try(ctx context.Context, batch []Transaction, force, rowByRow bool) (bool, error) {
	if s.plans.full() {
		if err := s.forgetPlans(ctx); err != nil {
			return false, err
		}
	}
	a := &applier{s: s, ctx: ctx, rowByRow: rowByRow, pl: pipeline{ctx: ctx, conn: s.conn.PgConn(), plans: s.plans}}
	for _, t := range s.plans.targets {
		t.run.reset() // of an earlier batch nothing may be left
	}
	if err := a.pl.query("BEGIN", nil, expectation{anyRows: true}); err != nil {
		return false, err
	}
	for i := range batch {
		if err := a.transaction(&batch[i]); err != nil {
			return false, err
		}
	}
	if err := a.sendRuns(); err != nil {
		return false, err
	}
	if err := a.sendMarks(); err != nil {
		return false, err
	}
	// Every answer is in and as expected before the position is set: it is a
	// variable of the session.
	if err := a.pl.drain(); err != nil {
		return false, err
	}
	return s.commit(ctx, &batch[len(batch)-1], force)
}

// The second column says whether the commit will have a record at all; without
// one the position stays where it was.
const (
	positionSQL       = "SELECT pg_replication_origin_xact_setup($1::pg_lsn, $2::timestamptz), pg_current_xact_id_if_assigned()::text"
	forcedPositionSQL = "SELECT pg_replication_origin_xact_setup($1::pg_lsn, $2::timestamptz), pg_current_xact_id()::text"
)

func (s *Session) commit(ctx context.Context, last *Transaction, force bool) (bool, error) {
	st := s.plans.position
	if force {
		st = s.plans.forcedPosition
	}
	at := last.CommitTime
	if at.IsZero() {
		at = last.Payload.Header.CommitTime
	}
	if at.IsZero() {
		at = time.Now()
	}
	p := s.conn.PgConn().StartPipeline(ctx)
	prepare := st.name == ""
	if prepare {
		s.plans.statements++
		st.name = "replay_" + strconv.Itoa(s.plans.statements)
		p.SendPrepare(st.name, st.sql, nil)
	}
	p.SendQueryPrepared(st.name, [][]byte{[]byte(pglogrepl.LSN(last.Slot).String()), []byte(at.UTC().Format("2006-01-02 15:04:05.999999+00"))}, nil, nil)
	p.SendQueryParams("COMMIT", nil, nil, nil, nil)
	if err := p.Sync(); err != nil {
		return false, fmt.Errorf("commit: %w", err)
	}
	if prepare {
		if _, err := p.GetResults(); err != nil {
			return false, fmt.Errorf("commit: %w", err)
		}
	}
	var wrote bool
	for i := range 2 {
		result, err := p.GetResults()
		if err != nil {
			return false, fmt.Errorf("commit: %w", err)
		}
		rr, ok := result.(*pgconn.ResultReader)
		if !ok {
			return false, fmt.Errorf("commit: answer of type %T from the server", result)
		}
		read := rr.Read()
		if read.Err != nil {
			return false, fmt.Errorf("commit: %w", read.Err)
		}
		switch {
		case i == 0 && len(read.Rows) == 1:
			wrote = read.Rows[0][1] != nil
		case i == 1 && read.CommandTag.String() == "COMMIT":
		default:
			return false, fmt.Errorf("commit: the server answered %q", read.CommandTag)
		}
	}
	if err := p.Close(); err != nil {
		return false, fmt.Errorf("commit: %w", err)
	}
	return wrote, nil
}

// forgetPlans drops what is known of tables and the statements made from it.
func (s *Session) forgetPlans(ctx context.Context) error {
	if _, err := s.conn.PgConn().Exec(ctx, "DEALLOCATE ALL").ReadAll(); err != nil {
		return err
	}
	s.plans = newPlanCache()
	return nil
}

// applier applies one batch in one transaction.
type applier struct {
	s        *Session
	ctx      context.Context
	pl       pipeline
	rowByRow bool
	slot     uint64
	dirty    []*target // with a run that is not sent, in the order of their first change
	marks    []entry.Mark
	params   [][]byte
	key      []byte
	buf      []byte
	arena    []byte // values of runs that must outlive their body
	volatile bool   // bodies are reused
	set      []int
}

func (a *applier) transaction(t *Transaction) error {
	a.slot = t.Slot
	r := a.s.reader
	r.Reset()
	switch t.Payload.Type {
	case 0, entry.TypeFragment: // a fragment changes nothing before its commit
		return nil
	case entry.TypeMarks:
		a.marks = append(a.marks, t.Payload.Marks...)
		return nil
	case entry.TypeTransaction:
		if err := a.body(t.Payload.Body); err != nil {
			return a.at(err)
		}
	case entry.TypeCommit:
		if t.Fragments == nil {
			return a.at(errors.New("a commit of fragments without its fragments"))
		}
		if err := a.fragments(t); err != nil {
			return a.at(err)
		}
	default:
		return a.at(fmt.Errorf("payload of unknown type %d", t.Payload.Type))
	}
	if err := r.Finish(); err != nil {
		return a.at(err)
	}
	return nil
}

// at says in which slot an error arose, or came to light: answers lag behind.
func (a *applier) at(err error) error {
	var conflict *ConflictError
	if errors.As(err, &conflict) {
		if conflict.Slot == 0 {
			conflict.Slot = a.slot
		}
		return err
	}
	return fmt.Errorf("at slot %d: %w", a.slot, err)
}

func (a *applier) fragments(t *Transaction) error {
	a.volatile = true
	defer func() { a.volatile = false }()
	var count uint32
	var sum uint32
	var size uint64
	err := t.Fragments(func(body []byte) error {
		count++
		sum = entry.Checksum(sum, body)
		size += uint64(len(body))
		return a.body(body)
	})
	if err != nil {
		return err
	}
	if h := &t.Payload.Header; count != t.Payload.Fragment || sum != h.Checksum || size != h.BodyBytes {
		return fmt.Errorf("%d fragments of %d bytes with checksum %08x, the commit names %d of %d bytes with %08x",
			count, size, sum, t.Payload.Fragment, h.BodyBytes, h.Checksum)
	}
	return nil
}

func (a *applier) body(body []byte) error {
	r := a.s.reader
	r.Feed(body)
	for {
		c, ok, err := r.Next()
		if err != nil {
			return err
		}
		if !ok {
			return nil
		}
		if err := a.change(&c); err != nil {
			return err
		}
	}
}

func (a *applier) change(c *entry.Change) error {
	switch c.Op {
	case entry.Insert, entry.Update, entry.Delete:
		p, err := a.plan(c.Relation)
		if err != nil {
			return err
		}
		if p.target.rowByRow || a.rowByRow {
			if err := a.sendRuns(); err != nil {
				return err
			}
		}
		switch c.Op {
		case entry.Insert:
			return a.insert(p, c)
		case entry.Update:
			return a.update(p, c)
		default:
			return a.remove(p, c)
		}
	case entry.Truncate:
		return a.truncate(c)
	case entry.DDL:
		return a.ddl(c)
	case entry.Message:
		return nil // not the database's affair
	}
	return fmt.Errorf("change of unknown kind %d", c.Op)
}

func (a *applier) plan(rel *entry.Relation) (*plan, error) {
	cache := a.s.plans
	if p := cache.last; p != nil && p.rel == rel {
		return p, nil
	}
	p := cache.plans[rel]
	if p == nil {
		if err := a.pl.drain(); err != nil {
			return nil, err
		}
		var err error
		if p, err = cache.load(a.ctx, a.s.conn, rel); err != nil {
			return nil, err
		}
	}
	cache.last = p
	return p, nil
}

func (a *applier) insert(p *plan, c *entry.Change) error {
	if !p.target.rowByRow && !a.rowByRow && len(p.cols) > 0 {
		r, err := a.run(p, entry.Insert)
		if err != nil {
			return err
		}
		for i := range p.cols {
			r.vals = append(r.vals, a.keep(c.New[p.cols[i].source], r))
		}
		r.rows++
		return a.sendFull(p.target)
	}
	a.params = a.params[:0]
	for i := range p.cols {
		a.params = append(a.params, parameterOf(&c.New[p.cols[i].source]))
	}
	return a.pl.exec(p.insertStatement(), a.params, expectation{rows: 1, slot: a.slot, plan: p, want: "to insert", key: a.shownKey(p, c.New)})
}

func (a *applier) shownKey(p *plan, vals []entry.Value) string {
	if !a.rowByRow {
		return ""
	}
	return rowKey(p, vals)
}

func (a *applier) update(p *plan, c *entry.Change) error {
	old := c.New
	if c.OldKind != 0 {
		old = c.Old
	}
	if len(p.key) == 0 && !p.whole {
		return &ConflictError{Slot: a.slot, Table: p.target.shown, Want: "a replica identity for an update"}
	}
	keySame := true
	if c.OldKind != 0 {
		for _, k := range p.key {
			n := &c.New[p.cols[k].source]
			if n.Kind != entry.Unchanged && !equal(n, &old[p.cols[k].source]) {
				keySame = false
				break
			}
		}
	}
	restSent := true
	for _, k := range p.rest {
		if c.New[p.cols[k].source].Kind == entry.Unchanged {
			restSent = false
			break
		}
	}
	for _, k := range p.key {
		if old[p.cols[k].source].Kind == entry.Unchanged {
			return &ConflictError{Slot: a.slot, Table: p.target.shown, Want: "the value of each key column"}
		}
	}
	allRest := keySame && restSent && !p.whole
	if allRest && p.free && len(p.rest) > 0 && !a.rowByRow {
		return a.updateInRun(p, c, old)
	}
	if err := a.sendRun(p.target); err != nil {
		return err
	}
	a.params = a.params[:0]
	for _, k := range p.key {
		a.params = append(a.params, parameterOf(&old[p.cols[k].source]))
	}
	want := expectation{rows: 1, slot: a.slot, plan: p, want: "to update", key: a.shownKey(p, old)}
	if allRest && !p.restHasIdentityAlways() {
		for _, k := range p.rest {
			a.params = append(a.params, parameterOf(&c.New[p.cols[k].source]))
		}
		return a.pl.exec(p.updateAllStatement(), a.params, want)
	}
	a.set = a.set[:0]
	for k := range p.cols {
		n := &c.New[p.cols[k].source]
		if n.Kind == entry.Unchanged {
			continue
		}
		// A value known to be as before is left alone; of the key it always is known.
		if c.OldKind == 'O' && equal(n, &c.Old[p.cols[k].source]) || keySame && !p.whole && isKey(p, k) {
			continue
		}
		a.set = append(a.set, k)
		a.params = append(a.params, parameterOf(n))
	}
	return a.pl.exec(p.updateSomeStatement(a.set), a.params, want)
}

func isKey(p *plan, col int) bool {
	for _, k := range p.key {
		if k == col {
			return true
		}
	}
	return false
}

func equal(a, b *entry.Value) bool { return a.Kind == b.Kind && bytes.Equal(a.Data, b.Data) }

func (a *applier) updateInRun(p *plan, c *entry.Change, old []entry.Value) error {
	r, err := a.run(p, entry.Update)
	if err != nil {
		return err
	}
	width := r.width()
	start := len(r.vals)
	for _, k := range p.key {
		r.vals = append(r.vals, old[p.cols[k].source])
	}
	a.key = appendKey(a.key[:0], r.vals[start:])
	if row, ok := r.index[string(a.key)]; ok {
		r.vals = r.vals[:start]
		at := row*width + len(p.key)
		for i, k := range p.rest {
			r.vals[at+i] = a.keep(c.New[p.cols[k].source], r)
		}
		return a.sendFull(p.target)
	}
	for i := start; i < len(r.vals); i++ {
		r.vals[i] = a.keep(r.vals[i], r)
	}
	for _, k := range p.rest {
		r.vals = append(r.vals, a.keep(c.New[p.cols[k].source], r))
	}
	r.index[string(a.key)] = r.rows
	r.rows++
	return a.sendFull(p.target)
}

func (a *applier) remove(p *plan, c *entry.Change) error {
	if len(p.key) == 0 && !p.whole {
		return &ConflictError{Slot: a.slot, Table: p.target.shown, Want: "a replica identity for a delete"}
	}
	if !p.whole && !p.target.rowByRow && !a.rowByRow {
		r, err := a.run(p, entry.Delete)
		if err != nil {
			return err
		}
		for _, k := range p.key {
			r.vals = append(r.vals, a.keep(c.Old[p.cols[k].source], r))
		}
		r.rows++ // a key that comes twice makes the count wrong, as it should
		return a.sendFull(p.target)
	}
	if err := a.sendRun(p.target); err != nil {
		return err
	}
	a.params = a.params[:0]
	for _, k := range p.key {
		a.params = append(a.params, parameterOf(&c.Old[p.cols[k].source]))
	}
	return a.pl.exec(p.deleteStatement(), a.params, expectation{rows: 1, slot: a.slot, plan: p, want: "to delete", key: a.shownKey(p, c.Old)})
}

func (a *applier) truncate(c *entry.Change) error {
	if len(c.Truncate) == 0 {
		return nil
	}
	if err := a.sendRuns(); err != nil {
		return err
	}
	var tables []string
	var first *plan
	for _, rel := range c.Truncate {
		p, err := a.plan(rel)
		if err != nil {
			return err
		}
		if first == nil {
			first = p
		}
		tables = append(tables, p.target.only()+p.target.name)
	}
	sql := "TRUNCATE " + strings.Join(tables, ", ")
	if c.Restart {
		sql += " RESTART IDENTITY"
	}
	if c.Cascade {
		// The list has every published table that the publisher emptied; what it
		// cannot have are tables that are never published, such as unlogged ones.
		sql += " CASCADE"
	}
	return a.pl.query(sql, nil, expectation{anyRows: true, slot: a.slot, plan: first, want: "to empty"})
}

func (a *applier) ddl(c *entry.Change) error {
	if err := a.settle(); err != nil {
		return err
	}
	if a.s.cfg.DDL == nil {
		return &ConflictError{Slot: a.slot, Want: "a way to apply schema changes"}
	}
	if _, err := a.s.conn.PgConn().Exec(a.ctx, planningDefault()).ReadAll(); err != nil {
		return err
	}
	if err := a.s.cfg.DDL(a.ctx, a.s.conn, c.Content); err != nil {
		// Unless the connection broke or somebody is in the way, it will not apply
		// the next time either: a missing role, say.
		if isLockConflict(err) || a.s.conn.IsClosed() || a.ctx.Err() != nil || isRefusal(err) && !isConflict(err) {
			return fmt.Errorf("schema change: %w", err)
		}
		return &ConflictError{Slot: a.slot, Want: "the schema change to apply", Err: err}
	}
	if status := a.s.conn.PgConn().TxStatus(); status != 'T' {
		return fmt.Errorf("schema change left the transaction in state %q", status)
	}
	if err := a.s.restoreSettings(a.ctx); err != nil {
		return fmt.Errorf("restore settings after a schema change: %w", err)
	}
	if err := a.s.forgetPlans(a.ctx); err != nil {
		return err
	}
	a.pl.plans = a.s.plans
	return nil
}

// settle brings the database to this point of the log, answers and all.
func (a *applier) settle() error {
	if err := a.sendRuns(); err != nil {
		return err
	}
	if err := a.sendMarks(); err != nil {
		return err
	}
	return a.pl.drain()
}

func (a *applier) sendMarks() error {
	if len(a.marks) == 0 {
		return nil
	}
	if err := a.pl.drain(); err != nil {
		return err
	}
	if a.s.cfg.Marks == nil {
		return fmt.Errorf("slot %d: no way to apply sequence marks", a.slot)
	}
	if err := a.s.cfg.Marks(a.ctx, a.s.conn, latest(a.marks)); err != nil {
		return fmt.Errorf("sequence marks up to slot %d: %w", a.slot, err)
	}
	a.marks = a.marks[:0]
	return nil
}

// latest keeps the last mark of each sequence.
func latest(marks []entry.Mark) []entry.Mark {
	type name struct{ schema, name string }
	at := make(map[name]int, len(marks))
	var out []entry.Mark
	for _, m := range marks {
		if i, ok := at[name{m.Schema, m.Name}]; ok {
			out[i] = m
			continue
		}
		at[name{m.Schema, m.Name}] = len(out)
		out = append(out, m)
	}
	return out
}

// run returns the run of p's table for op, after sending one that does not fit.
func (a *applier) run(p *plan, op entry.Op) (*run, error) {
	r := &p.target.run
	if r.op == op && r.plan == p {
		return r, nil
	}
	if err := a.sendRun(p.target); err != nil {
		return nil, err
	}
	r.op, r.plan, r.slot = op, p, a.slot
	if r.index == nil {
		r.index = make(map[string]int)
	}
	a.dirty = append(a.dirty, p.target)
	return r, nil
}

// keep makes a value last until its run is sent.
func (a *applier) keep(v entry.Value, r *run) entry.Value {
	r.bytes += len(v.Data) + 8
	if a.volatile && len(v.Data) > 0 {
		start := len(a.arena)
		a.arena = append(a.arena, v.Data...) // a grown arena leaves earlier values in the old one
		v.Data = a.arena[start:len(a.arena):len(a.arena)]
	}
	return v
}

// sendFull sends the run of a table when it has reached its bounds.
func (a *applier) sendFull(t *target) error {
	if !t.run.full() && len(a.arena) < 4*runBytesMax {
		return nil
	}
	if t.run.full() {
		return a.sendRun(t)
	}
	return a.sendRuns()
}

// sendRuns sends the runs of all tables.
func (a *applier) sendRuns() error {
	for len(a.dirty) > 0 {
		if err := a.sendRun(a.dirty[0]); err != nil {
			return err
		}
	}
	a.arena = a.arena[:0]
	return nil
}

func (a *applier) sendRun(t *target) error {
	r := &t.run
	if r.op == 0 {
		return nil
	}
	for i, d := range a.dirty {
		if d == t {
			a.dirty = append(a.dirty[:i], a.dirty[i+1:]...)
			break
		}
	}
	defer r.reset()
	p := r.plan
	want := expectation{rows: int64(r.rows), slot: r.slot, plan: p}
	var one func() *statement
	var many func() *statement
	switch r.op {
	case entry.Insert:
		want.want, one, many = "to insert", p.insertStatement, p.insertManyStatement
	case entry.Update:
		want.want, one, many = "to update", p.updateAllStatement, p.updateManyStatement
	case entry.Delete:
		want.want, one, many = "to delete", p.deleteStatement, p.deleteManyStatement
	}
	if r.op == entry.Insert && r.rows >= copyRowsMin {
		a.buf = r.appendCopy(a.buf[:0])
		return a.pl.copyIn(p.copyIn, a.buf, want)
	}
	a.params = a.params[:0]
	if r.rows == 1 {
		for i := range r.vals {
			a.params = append(a.params, parameterOf(&r.vals[i]))
		}
		return a.pl.exec(one(), a.params, want)
	}
	a.buf = a.buf[:0]
	width := r.width()
	ends := make([]int, width)
	for c := range width {
		a.buf = r.appendArray(a.buf, c)
		ends[c] = len(a.buf)
	}
	start := 0
	for _, end := range ends {
		a.params = append(a.params, a.buf[start:end])
		start = end
	}
	return a.pl.exec(many(), a.params, want)
}

var empty = []byte{}

// parameterOf is a value as a parameter in text format: nil is NULL.
func parameterOf(v *entry.Value) []byte {
	if v.Kind == entry.Null {
		return nil
	}
	if v.Data == nil {
		return empty
	}
	return v.Data
}
