package entry

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"
)

// render reads bodies as one transaction into JSON lines.
func render(r *Reader, bodies ...[]byte) (string, error) {
	r.Reset()
	var out strings.Builder
	for _, body := range bodies {
		r.Feed(body)
		for {
			c, ok, err := r.Next()
			if err != nil {
				return "", err
			}
			if !ok {
				break
			}
			line := c.AppendJSON(nil)
			if !json.Valid(line) {
				return "", fmt.Errorf("not JSON: %s", line)
			}
			fmt.Fprintf(&out, "%s\n", line)
		}
	}
	return out.String(), r.Finish()
}

const sampleJSON = `{"op":"insert","schema":"public","table":"t","new":{"id":"1","v":null}}
{"op":"update","schema":"public","table":"t","key":{"id":"1"},"new":{"id":"2"},"unchanged":["v"]}
{"op":"delete","schema":"s","table":"u","old":{"a":""}}
{"op":"truncate","tables":[{"schema":"public","table":"t"},{"schema":"s","table":"u"}],"cascade":true,"restart_identity":true}
{"op":"ddl","ddl":{"x":1}}
{"op":"message","prefix":"other","content_base64":"/wo="}
`

func TestReaderReadsEveryKindOfChange(t *testing.T) {
	got, err := render(NewReader(NewRelationCache()), sampleBody().Body())
	if err != nil || got != sampleJSON {
		t.Fatalf("%v\n%s\nwant\n%s", err, got, sampleJSON)
	}
}

func TestReaderCarriesMessagesAndRelationsAcrossBodies(t *testing.T) {
	body := sampleBody().Body()
	r := NewReader(NewRelationCache())
	for size := 1; size <= len(body); size++ {
		got, err := render(r, slices.Collect(slices.Chunk(body, size))...)
		if err != nil || got != sampleJSON {
			t.Fatalf("cut every %d bytes: %v\n%s", size, err, got)
		}
	}
	for cut := 1; cut < len(body); cut++ {
		got, err := render(r, body[:cut])
		if err == nil && !strings.HasPrefix(sampleJSON, got) {
			t.Fatalf("cut at %d: %q", cut, got)
		}
	}
	if _, err := render(r, body[:len(body)-1]); !errors.Is(err, ErrCorrupt) {
		t.Fatalf("a transaction that ends within a message: %v", err)
	}
}

func TestReaderForgetsRelationsOfTheLastTransaction(t *testing.T) {
	r := NewReader(NewRelationCache())
	body := sampleBody().Body()
	if _, err := render(r, body); err != nil {
		t.Fatal(err)
	}
	insert := wireInsert(7, text("1"), text("2"))
	bare := append([]byte{byte(len(insert))}, insert...)
	if _, err := render(r, bare); !errors.Is(err, ErrCorrupt) {
		t.Fatalf("change of a relation this transaction did not describe: %v", err)
	}
}

func TestRelationsAreSharedBetweenTransactions(t *testing.T) {
	cache := NewRelationCache()
	a, err := cache.Relation(relT)
	if err != nil {
		t.Fatal(err)
	}
	b, err := cache.Relation(bytes.Clone(relT))
	if err != nil || a != b {
		t.Fatalf("%p and %p, %v", a, b, err)
	}
	want := &Relation{ID: 7, Schema: "public", Name: "t", Identity: 'd', Columns: []Column{
		{Name: "id", TypeOID: 23, TypeMod: -1, Key: true}, {Name: "v", TypeOID: 25, TypeMod: -1}}}
	if !reflect.DeepEqual(a, want) {
		t.Fatalf("%+v", a)
	}
}

func TestBodyDoesNotDependOnRepeatedRelations(t *testing.T) {
	build := func(repeat bool) *Builder {
		b := NewBuilder()
		must(b.Define(relT))
		if repeat { // an earlier transaction of the session used it
			b.Begin()
			must(b.Add(wireInsert(7, text("0"), text("0"))))
		}
		b.Begin()
		for i := range 3 {
			if repeat || i == 0 {
				must(b.Define(relT))
			}
			must(b.Add(wireInsert(7, text(fmt.Sprint(i)), text("x"))))
		}
		return b
	}
	once, often := build(false), build(true)
	if !bytes.Equal(once.Body(), often.Body()) || once.Checksum() != often.Checksum() {
		t.Fatalf("%q\n%q", once.Body(), often.Body())
	}
}

func TestRelationThatChangesWithinATransactionIsWrittenAgain(t *testing.T) {
	b := NewBuilder()
	b.Begin()
	must(b.Define(relT))
	must(b.Add(wireInsert(7, text("1"), text("x"))))
	must(b.Define(wireRelation(7, "public", "t", 'd', Column{Name: "id", TypeOID: 23, TypeMod: -1, Key: true})))
	must(b.Add(wireInsert(7, text("2"))))
	got, err := render(NewReader(NewRelationCache()), b.Body())
	want := `{"op":"insert","schema":"public","table":"t","new":{"id":"1","v":"x"}}
{"op":"insert","schema":"public","table":"t","new":{"id":"2"}}
`
	if err != nil || got != want {
		t.Fatalf("%v\n%s", err, got)
	}
}

func TestBuilderTakesFragmentsWithARunningChecksum(t *testing.T) {
	whole := sampleBody()
	cut := sampleBody()
	var taken []byte
	for len(cut.Body()) > 0 {
		n := min(11, len(cut.Body()))
		taken = append(taken, cut.Body()[:n]...)
		cut.Take(n)
	}
	if !bytes.Equal(taken, whole.Body()) || cut.Checksum() != whole.Checksum() || cut.Bytes() != whole.Bytes() || cut.Changes() != 5 {
		t.Fatalf("checksum %08x of %d bytes, want %08x of %d; %d changes", cut.Checksum(), cut.Bytes(), whole.Checksum(), whole.Bytes(), cut.Changes())
	}
}

func TestSummaryCountsByTable(t *testing.T) {
	p := samplePayloads()[0]
	got, err := Summary(p)
	want := Totals{
		Tables:   []TableTotals{{Schema: "public", Name: "t", Inserts: 1, Updates: 1, Truncates: 1}, {Schema: "s", Name: "u", Deletes: 1, Truncates: 1}},
		DDL:      []string{`{"x":1}`},
		Messages: 1,
		Bytes:    uint64(len(p.Body)),
	}
	if err != nil || !reflect.DeepEqual(got, want) || got.Rows() != 3 {
		t.Fatalf("%v\n%+v\n%+v", err, got, want)
	}
}

func TestReadingARowAllocatesNothing(t *testing.T) {
	body, _ := manyRows(1000)
	r := NewReader(NewRelationCache())
	read := func() {
		r.Reset()
		if n := count(t, r, body); n != 1000 {
			t.Fatalf("%d rows", n)
		}
	}
	read()
	if n := testing.AllocsPerRun(10, read); n > 0 {
		t.Fatalf("%v allocations for 1000 rows", n)
	}
}

func TestJSONStringsAgreeWithTheStandardLibrary(t *testing.T) {
	for _, s := range []string{"", "plain", "\"\\/\b\f\n\r\t\x00\x1f\x7f", "héé 日本 😀", "bad \xff\xc3 bytes", "\u2028"} {
		var got, want string
		if err := json.Unmarshal(appendString(nil, []byte(s)), &got); err != nil {
			t.Fatalf("%q: %v", s, err)
		}
		b, _ := json.Marshal(s)
		must(json.Unmarshal(b, &want))
		if got != want {
			t.Fatalf("%q became %q, want %q", s, got, want)
		}
	}
}

func FuzzReader(f *testing.F) {
	f.Add(sampleBody().Body(), uint16(9))
	f.Fuzz(func(t *testing.T, body []byte, cut uint16) {
		r := NewReader(NewRelationCache())
		whole, err := render(r, body)
		if err != nil && !errors.Is(err, ErrCorrupt) {
			t.Fatal(err)
		}
		at := min(int(cut), len(body))
		inTwo, err2 := render(r, body[:at], body[at:])
		if (err == nil) != (err2 == nil) || whole != inTwo {
			t.Fatalf("whole: %v %q\ncut at %d: %v %q", err, whole, at, err2, inTwo)
		}
	})
}

func manyRows(n int) (body []byte, rows int) {
	b := NewBuilder()
	b.Begin()
	must(b.Define(relT))
	for i := range n {
		must(b.Add(wireInsert(7, text(fmt.Sprint(i)), text("some text of a usual length, forty bytes"))))
	}
	return b.Body(), n
}

func count(t testing.TB, r *Reader, body []byte) int {
	r.Feed(body)
	for n := 0; ; n++ {
		_, ok, err := r.Next()
		if err != nil {
			t.Fatal(err)
		}
		if !ok {
			return n
		}
	}
}

func BenchmarkReader(b *testing.B) {
	for _, n := range []int{1, 1000} {
		b.Run(fmt.Sprintf("rows=%d", n), func(b *testing.B) {
			body, rows := manyRows(n)
			r := NewReader(NewRelationCache())
			b.SetBytes(int64(len(body)))
			b.ReportAllocs()
			for b.Loop() {
				r.Reset()
				count(b, r, body)
			}
			b.ReportMetric(float64(rows)*float64(b.N)/b.Elapsed().Seconds(), "rows/s")
		})
	}
}

func BenchmarkBuildAndEncode(b *testing.B) {
	insert := wireInsert(7, text("1"), text("some text of a usual length, forty bytes"))
	builder := NewBuilder()
	must(builder.Define(relT))
	var out []byte
	b.ReportAllocs()
	for b.Loop() {
		builder.Begin()
		must(builder.Add(insert))
		p := Payload{Type: TypeTransaction, Body: builder.Body()}
		out = p.Append(out[:0])
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "tx/s")
}
