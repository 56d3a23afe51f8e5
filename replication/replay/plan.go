package replay

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/jackc/pgx/v5"

	"quorate/replication/entry"
)

// plan is how changes of one publisher's relation are applied to its table here.
type plan struct {
	rel    *entry.Relation
	target *target
	cols   []planColumn // of the relation that are written here, in its order
	key    []int        // indexes into cols: what identifies a row
	rest   []int        // indexes into cols: all that are not of the key
	// keyWhere compares each column of the key, in the order of key, with the SQL
	// of a value put between the two.
	keyWhere [][2]string
	// whole: no key, rows are found by all their values, and of equal ones any is as good.
	whole bool
	// free: the only uniqueness of the table is that of the key, so updates of
	// rows with different keys commute, and the later of two with the same key
	// and columns stands for both.
	free bool

	insert, insertMany, update, updateMany, remove, removeMany *statement
	copyIn                                                     string
	others                                                     map[string]*statement
}

type planColumn struct {
	source int // index into the relation's columns
	name   string
	*targetColumn
}

// statement is prepared when it is first sent.
type statement struct {
	sql  string
	name string // "" until then
}

const (
	plansMax      = 4_000
	statementsMax = 2_000 // prepared in the server at once
)

type planCache struct {
	plans      map[*entry.Relation]*plan
	targets    map[[2]string]*target
	statements int
	last       *plan

	position, forcedPosition *statement
}

func newPlanCache() *planCache {
	return &planCache{plans: make(map[*entry.Relation]*plan), targets: make(map[[2]string]*target),
		position: &statement{sql: positionSQL}, forcedPosition: &statement{sql: forcedPositionSQL}}
}

// full reports that the cache must start anew before it grows further.
func (c *planCache) full() bool { return len(c.plans) >= plansMax || c.statements >= statementsMax }

// load makes the plan for a relation. The connection must be free for queries
// for that.
func (c *planCache) load(ctx context.Context, conn *pgx.Conn, rel *entry.Relation) (*plan, error) {
	id := [2]string{rel.Schema, rel.Name}
	t := c.targets[id]
	if t == nil {
		var err error
		if t, err = loadTarget(ctx, conn, rel.Schema, rel.Name); err != nil {
			return nil, err
		}
		if t == nil {
			return nil, &ConflictError{Table: rel.Schema + "." + rel.Name, Want: "the table to exist"}
		}
		c.targets[id] = t
	}
	p, err := newPlan(rel, t)
	if err != nil {
		return nil, err
	}
	c.plans[rel] = p
	return p, nil
}

func newPlan(rel *entry.Relation, t *target) (*plan, error) {
	p := &plan{rel: rel, target: t, others: make(map[string]*statement)}
	for i := range rel.Columns {
		c := t.column(rel.Columns[i].Name)
		if c == nil {
			return nil, &ConflictError{Table: t.shown, Want: fmt.Sprintf("column %q to exist", rel.Columns[i].Name)}
		}
		if c.generated {
			continue // computed here again
		}
		p.cols = append(p.cols, planColumn{source: i, name: pgx.Identifier{c.name}.Sanitize(), targetColumn: c})
	}
	index := p.identify()
	for i := range p.cols {
		if !slices.Contains(p.key, i) {
			p.rest = append(p.rest, i)
		}
	}
	for _, k := range p.key {
		c := &p.cols[k]
		operator := ""
		if index != nil {
			operator = index.operators[slices.Index(index.columns, c.targetColumn.name)]
		}
		switch {
		case operator != "":
			p.keyWhere = append(p.keyWhere, [2]string{"t." + c.name + " " + operator + " ", ""})
		case c.exact:
			p.keyWhere = append(p.keyWhere, [2]string{"t." + c.name + " IS NOT DISTINCT FROM ", ""})
		default:
			// Byte for byte: there are types without equality (json, point), and
			// others whose equality is too wide for "this very row" (numeric, citext).
			p.keyWhere = append(p.keyWhere, [2]string{"t." + c.name + `::text COLLATE "C" IS NOT DISTINCT FROM (`, ")::text"})
		}
	}
	p.free = index != nil && !p.whole && !t.rowByRow && !p.restHasIdentityAlways()
	for i := range t.indexes {
		x := &t.indexes[i]
		if x.exclusion || x.partial || !sameColumns(x.columns, p.keyNames()) {
			p.free = false
		}
	}
	p.copyIn = "COPY " + t.name + " (" + p.columnList(p.all()) + ") FROM STDIN"
	return p, nil
}

// identify chooses what rows are found by, and returns the unique index behind
// it, if there is one.
func (p *plan) identify() *targetIndex {
	var names []string
	switch p.rel.Identity {
	case 'f':
		for i := range p.target.indexes {
			x := &p.target.indexes[i]
			if x.primary && !x.deferred && p.holds(x.columns) {
				names = x.columns
			}
		}
		if names == nil {
			p.whole = true
			p.key = p.all()
			return nil
		}
	default:
		for i := range p.rel.Columns {
			if p.rel.Columns[i].Key {
				names = append(names, p.rel.Columns[i].Name)
			}
		}
	}
	for i := range p.cols {
		if slices.Contains(names, p.cols[i].targetColumn.name) {
			p.key = append(p.key, i)
		}
	}
	for i := range p.target.indexes {
		x := &p.target.indexes[i]
		if !x.partial && !x.exclusion && !x.deferred && sameColumns(x.columns, names) {
			return x
		}
	}
	return nil
}

func (p *plan) holds(names []string) bool {
	for _, n := range names {
		if !slices.ContainsFunc(p.cols, func(c planColumn) bool { return c.targetColumn.name == n }) {
			return false
		}
	}
	return true
}

func (p *plan) keyNames() []string {
	names := make([]string, len(p.key))
	for i, k := range p.key {
		names[i] = p.cols[k].targetColumn.name
	}
	return names
}

func (p *plan) restHasIdentityAlways() bool {
	return slices.ContainsFunc(p.rest, func(i int) bool { return p.cols[i].identityAlways })
}

func sameColumns(a, b []string) bool {
	if len(a) != len(b) {
		return false
	}
	for _, n := range a {
		if !slices.Contains(b, n) {
			return false
		}
	}
	return true
}

func (p *plan) all() []int {
	all := make([]int, len(p.cols))
	for i := range all {
		all[i] = i
	}
	return all
}

func (p *plan) columnList(which []int) string {
	names := make([]string, len(which))
	for i, c := range which {
		names[i] = p.cols[c].name
	}
	return strings.Join(names, ", ")
}

func parameter(n int, typ string) string { return "$" + strconv.Itoa(n) + "::" + typ }

// where finds one row; the values of the key are the parameters from 1 on.
func (p *plan) where() string {
	conditions := make([]string, len(p.key))
	for i, k := range p.key {
		conditions[i] = p.keyWhere[i][0] + parameter(i+1, p.cols[k].typ) + p.keyWhere[i][1]
	}
	all := strings.Join(conditions, " AND ")
	if all == "" {
		all = "true"
	}
	if !p.whole {
		return all
	}
	return "(t.tableoid, t.ctid) = (SELECT t.tableoid, t.ctid FROM " + p.target.only() + p.target.name + " AS t WHERE " + all + " LIMIT 1)"
}

// unnest turns one array parameter for each of these columns into rows u.
func (p *plan) unnest(which []int) string {
	var arrays, names []string
	for i, c := range which {
		typ := "text"
		if p.cols[c].elementOfArray {
			typ = p.cols[c].typ
		}
		arrays = append(arrays, parameter(i+1, typ+"[]"))
		names = append(names, "c"+strconv.Itoa(c))
	}
	return "unnest(" + strings.Join(arrays, ", ") + ") AS u(" + strings.Join(names, ", ") + ")"
}

func (p *plan) unnested(c int) string {
	s := "u.c" + strconv.Itoa(c)
	if !p.cols[c].elementOfArray {
		s += "::" + p.cols[c].typ
	}
	return s
}

func (p *plan) insertStatement() *statement {
	if p.insert == nil {
		values := make([]string, len(p.cols))
		for i := range p.cols {
			values[i] = parameter(i+1, p.cols[i].typ)
		}
		sql := "INSERT INTO " + p.target.name + " DEFAULT VALUES"
		if len(p.cols) > 0 {
			sql = "INSERT INTO " + p.target.name + " (" + p.columnList(p.all()) + ") OVERRIDING SYSTEM VALUE VALUES (" + strings.Join(values, ", ") + ")"
		}
		p.insert = &statement{sql: sql}
	}
	return p.insert
}

func (p *plan) insertManyStatement() *statement {
	if p.insertMany == nil {
		values := make([]string, len(p.cols))
		for i := range p.cols {
			values[i] = p.unnested(i)
		}
		p.insertMany = &statement{sql: "INSERT INTO " + p.target.name + " (" + p.columnList(p.all()) + ") OVERRIDING SYSTEM VALUE SELECT " +
			strings.Join(values, ", ") + " FROM " + p.unnest(p.all())}
	}
	return p.insertMany
}

// updateStatement sets the columns of set; their values follow those of the key.
func (p *plan) updateStatement(set []int) *statement {
	if len(set) == 0 {
		// Nothing to write, but the row must be there.
		return &statement{sql: "SELECT FROM " + p.target.only() + p.target.name + " AS t WHERE " + p.where() + " FOR UPDATE"}
	}
	identityAlways := slices.ContainsFunc(set, func(i int) bool { return p.cols[i].identityAlways })
	if identityAlways {
		return &statement{sql: p.replaceSQL(set)}
	}
	assignments := make([]string, len(set))
	for i, c := range set {
		assignments[i] = p.cols[c].name + " = " + parameter(len(p.key)+i+1, p.cols[c].typ)
	}
	return &statement{sql: "UPDATE " + p.target.only() + p.target.name + " AS t SET " + strings.Join(assignments, ", ") + " WHERE " + p.where()}
}

// replaceSQL is an update of a column GENERATED ALWAYS AS IDENTITY, which UPDATE
// can only set to its default: the row goes and comes again.
func (p *plan) replaceSQL(set []int) string {
	var names, values []string
	for i := range p.target.columns {
		c := &p.target.columns[i]
		if c.generated {
			continue
		}
		name := pgx.Identifier{c.name}.Sanitize()
		value := "d." + name
		for n, s := range set {
			if p.cols[s].targetColumn == c {
				value = parameter(len(p.key)+n+1, c.typ)
			}
		}
		names, values = append(names, name), append(values, value)
	}
	return "WITH d AS (DELETE FROM " + p.target.only() + p.target.name + " AS t WHERE " + p.where() + " RETURNING t.*) INSERT INTO " + p.target.name +
		" (" + strings.Join(names, ", ") + ") OVERRIDING SYSTEM VALUE SELECT " + strings.Join(values, ", ") + " FROM d"
}

// updateAllStatement is that of an update which leaves the key alone and has all
// the other columns.
func (p *plan) updateAllStatement() *statement {
	if p.update == nil {
		p.update = p.updateStatement(p.rest)
	}
	return p.update
}

// updateSomeStatement is that of any other update.
func (p *plan) updateSomeStatement(set []int) *statement {
	id := fmt.Sprint(set)
	if p.others[id] == nil {
		p.others[id] = p.updateStatement(set)
	}
	return p.others[id]
}

func (p *plan) whereMany() string {
	conditions := make([]string, len(p.key))
	for i, k := range p.key {
		conditions[i] = p.keyWhere[i][0] + p.unnested(k) + p.keyWhere[i][1]
	}
	return strings.Join(conditions, " AND ")
}

func (p *plan) updateManyStatement() *statement {
	if p.updateMany == nil {
		assignments := make([]string, len(p.rest))
		for i, c := range p.rest {
			assignments[i] = p.cols[c].name + " = " + p.unnested(c)
		}
		p.updateMany = &statement{sql: "UPDATE " + p.target.only() + p.target.name + " AS t SET " + strings.Join(assignments, ", ") +
			" FROM " + p.unnest(append(slices.Clone(p.key), p.rest...)) + " WHERE " + p.whereMany()}
	}
	return p.updateMany
}

func (p *plan) deleteStatement() *statement {
	if p.remove == nil {
		p.remove = &statement{sql: "DELETE FROM " + p.target.only() + p.target.name + " AS t WHERE " + p.where()}
	}
	return p.remove
}

func (p *plan) deleteManyStatement() *statement {
	if p.removeMany == nil {
		p.removeMany = &statement{sql: "DELETE FROM " + p.target.only() + p.target.name + " AS t USING " + p.unnest(p.key) + " WHERE " + p.whereMany()}
	}
	return p.removeMany
}
