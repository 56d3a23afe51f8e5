package feed

import (
	"strings"
	"testing"
)

func TestSubjects(t *testing.T) {
	for _, tc := range []struct{ schema, table, want string }{
		{"public", "t", "quorate.c.main.public.t"},
		{"a.b", "c d", "quorate.c.main.a%2Eb.c%20d"},
		{"*", ">", "quorate.c.main.%2A.%3E"},
		{"a%2Eb", "t", "quorate.c.main.a%252Eb.t"},
		{"tab\there", "é", "quorate.c.main.tab%09here.é"},
		{"Äpfel_1", "$t-x", "quorate.c.main.Äpfel_1.$t-x"},
	} {
		if got := TableSubject("c", "main", tc.schema, tc.table); got != tc.want {
			t.Errorf("%q.%q: %s, want %s", tc.schema, tc.table, got, tc.want)
		}
	}
	if a, b := StreamName("a_b", "c"), StreamName("a", "b_c"); a == b || a != "quorate_a%5Fb_c" {
		t.Errorf("stream names %s, %s", a, b)
	}
	if got := StreamName("../x", `y\z`); strings.ContainsAny(got, `./\`) {
		t.Errorf("stream name %s", got)
	}
}

func TestMessageID(t *testing.T) {
	id := position{Slot: 1<<64 - 1, Ordinal: 12}.messageID(7)
	if group, p, err := parseMessageID(id); err != nil || group != 7 || p != (position{Slot: 1<<64 - 1, Ordinal: 12}) {
		t.Errorf("%s is parsed as %d, %v, %v", id, group, p, err)
	}
	for _, bad := range []string{"", "1/2", "1/2/3/4", "x/2/3", "1/-2/3", "4294967296/1/1"} {
		if _, _, err := parseMessageID(bad); err == nil {
			t.Errorf("%q is accepted", bad)
		}
	}
}

// A position message depends only on slot numbers and the message before it,
// and stands behind a whole block of slots without a message.
func TestNextMark(t *testing.T) {
	for last, want := range map[uint64]uint64{0: 512, 1: 512, 255: 512, 256: 768, 257: 768, 511: 768, 512: 1024} {
		if got := nextMark(last); got != want {
			t.Errorf("after slot %d: %d, want %d", last, got, want)
		}
	}
}
