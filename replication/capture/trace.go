package capture

import (
	"encoding/hex"

	"quorate/replication/entry"
)

// parseTraceparent reads a W3C traceparent of version 00.
func parseTraceparent(b []byte) (entry.Trace, bool) {
	const length = 55
	if len(b) != length || string(b[:3]) != "00-" || b[35] != '-' || b[52] != '-' {
		return entry.Trace{}, false
	}
	var t entry.Trace
	var flags [1]byte
	for _, part := range []struct{ to, from []byte }{{t.TraceID[:], b[3:35]}, {t.SpanID[:], b[36:52]}, {flags[:], b[53:]}} {
		if _, err := hex.Decode(part.to, part.from); err != nil {
			return entry.Trace{}, false
		}
	}
	t.Flags = flags[0]
	if t.TraceID == [16]byte{} || t.SpanID == [8]byte{} {
		return entry.Trace{}, false
	}
	return t, true
}
