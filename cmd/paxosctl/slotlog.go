package main

import (
	"bufio"
	"context"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"quorate/paxosgroup"
	"quorate/paxosgroup/slotlog"
)

const offlineHelp = `It works on the files alone, in a directory that no running sidecar uses: log.dir of
region.yaml, data_dir/log by default; with log.dirs, each of those. It changes no file.`

// verifyView is what is found in one directory. Its JSON field names are stable.
type verifyView struct {
	Dir      string       `json:"dir"`
	Sound    bool         `json:"sound"`
	Segments int          `json:"segments"`
	Bytes    int64        `json:"bytes"`
	Batches  int          `json:"batches"`
	Records  int          `json:"records"`
	Groups   []groupView  `json:"groups"`
	Torn     *tornView    `json:"torn_write"` // null: there is none
	Damage   []damageView `json:"damage"`
}

type groupView struct {
	Group    uint32 `json:"group"`
	Promised string `json:"promised"`
	Base     uint64 `json:"base"`
	Chosen   uint64 `json:"chosen"`
	Last     uint64 `json:"last"`
	Entries  int    `json:"entries"`
	Bytes    int64  `json:"bytes"`
}

type tornView struct {
	File   string `json:"file"`
	Offset int64  `json:"offset"`
	Bytes  int64  `json:"bytes"`
}

type damageView struct {
	File   string     `json:"file"`
	Offset int64      `json:"offset"`
	Group  uint32     `json:"group"` // 0: not known
	Slot   uint64     `json:"slot"`  // 0: not known
	What   string     `json:"what"`
	Behind behindView `json:"readable_behind"`
}

type behindView struct {
	Batches int        `json:"batches"`
	Records int        `json:"records"`
	Entries int        `json:"entries"`
	Groups  []spanView `json:"groups"`
}

type spanView struct {
	Group   uint32 `json:"group"`
	Entries int    `json:"entries"`
	First   uint64 `json:"first_slot"`
	Last    uint64 `json:"last_slot"`
}

func verifyViewOf(r slotlog.Report) verifyView {
	v := verifyView{
		Dir: r.Dir, Sound: len(r.Damage) == 0, Segments: r.Segments, Bytes: r.Bytes, Batches: r.Batches, Records: r.Records,
		Groups: []groupView{}, Damage: []damageView{},
	}
	for _, g := range r.Groups {
		v.Groups = append(v.Groups, groupView{
			Group: uint32(g.Group), Promised: g.Promised.String(), Base: uint64(g.Base), Chosen: uint64(g.Chosen), Last: uint64(g.Last),
			Entries: g.Entries, Bytes: g.Bytes,
		})
	}
	if r.Torn != nil {
		v.Torn = &tornView{r.Torn.File, r.Torn.Offset, r.Torn.Bytes}
	}
	for _, c := range r.Damage {
		d := damageView{
			File: c.File, Offset: c.Offset, Group: uint32(c.Group), Slot: uint64(c.Slot), What: c.What,
			Behind: behindView{Batches: c.Behind.Batches, Records: c.Behind.Records, Entries: c.Behind.Entries, Groups: []spanView{}},
		}
		for _, s := range c.Behind.Groups {
			d.Behind.Groups = append(d.Behind.Groups, spanView{uint32(s.Group), s.Entries, uint64(s.First), uint64(s.Last)})
		}
		v.Damage = append(v.Damage, d)
	}
	return v
}

func logVerifyCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "verify DIR...",
		Short: "Check the files of a sidecar's log, offline",
		Long: `Read all files of a sidecar's log as a start would, and say whether it is sound and
what it holds.

` + offlineHelp + `

A write that a crash cut short at the very end is sound: nobody was answered before it
was flushed, and the next start cuts it off. Anything else that does not check out is
damage: something that was flushed is not what was written. The first place in each
file is told with its offset there, and what can still be read behind it.

` + exitCodesHelp,
		Example: `  paxosctl log verify /var/lib/quorate/log
  paxosctl log verify /disk1/log /disk2/log -o json | jq '.[] | select(.sound | not)'`,
		Args: usage(cobra.MinimumNArgs(1)),
	}
	output := addOutputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, dirs []string) error {
		return quietly(verifyLogs(cmd.Context(), cmd.OutOrStdout(), dirs, *output))
	}
	return cmd
}

// verifyLogs prints what all directories hold, though one of them is not to be read.
func verifyLogs(ctx context.Context, w io.Writer, dirs []string, output format) error {
	var errs []error
	damaged := 0
	views := []verifyView{}
	for _, dir := range dirs {
		report, err := slotlog.Inspect(dir, func(slotlog.Inspected) error { return ctx.Err() })
		if err != nil {
			errs = append(errs, logError(dir, err))
			continue
		}
		if len(report.Damage) > 0 {
			damaged++
		}
		views = append(views, verifyViewOf(report))
		if output == formatTable {
			if err := printReport(w, report); err != nil {
				return err
			}
		}
	}
	if output == formatJSON {
		if err := printJSON(w, views); err != nil {
			return err
		}
	}
	if damaged > 0 {
		errs = append(errs, damage(damaged, len(dirs)))
		return &codedError{code: exitDamaged, err: errors.Join(errs...)}
	}
	return errors.Join(errs...)
}

// logError says what keeps a directory from being read.
func logError(dir string, err error) error {
	switch {
	case errors.Is(err, slotlog.ErrLocked), errors.Is(err, slotlog.ErrNoLog):
		return err // they name it
	}
	return fmt.Errorf("slot log in %s: %w", dir, err)
}

func damage(damaged, of int) error {
	return fmt.Errorf("damaged: %d of %d logs (%s)", damaged, of, slotlog.DamageAdvice)
}

func printReport(w io.Writer, r slotlog.Report) error {
	verdict := "sound"
	if len(r.Damage) > 0 {
		verdict = "DAMAGED"
	}
	if _, err := fmt.Fprintf(w, "%s: %s; segments %d, bytes %d, batches %d, records %d\n", r.Dir, verdict, r.Segments, r.Bytes, r.Batches, r.Records); err != nil {
		return err
	}
	for _, c := range r.Damage {
		if _, err := fmt.Fprintf(w, "  damage: %s: %s\n    %s\n    this is no write that was cut short: it was flushed, and has changed or gone since\n", c.Where(), c.What, c.Behind); err != nil {
			return err
		}
	}
	if t := r.Torn; t != nil {
		if _, err := fmt.Fprintf(w, "  cut short: %s at offset %d, %d bytes: a write that did not end; harmless, nobody was answered, the next start cuts it off\n", t.File, t.Offset, t.Bytes); err != nil {
			return err
		}
	}
	if len(r.Groups) == 0 {
		return nil
	}
	if len(r.Damage) > 0 {
		if _, err := fmt.Fprintln(w, "  what stands before the damage:"); err != nil {
			return err
		}
	}
	rows := [][]string{{"  GROUP", "PROMISED", "BASE", "CHOSEN", "LAST", "ENTRIES", "BYTES"}}
	for _, g := range r.Groups {
		rows = append(rows, []string{
			fmt.Sprintf("  %d", g.Group), g.Promised.String(), fmt.Sprint(g.Base), fmt.Sprint(g.Chosen), fmt.Sprint(g.Last), fmt.Sprint(g.Entries), fmt.Sprint(g.Bytes),
		})
	}
	return printTable(w, rows)
}

// recordView is one record of the files. Its JSON field names are stable.
type recordView struct {
	File         string  `json:"file"`
	Offset       int64   `json:"offset"`
	Bytes        int     `json:"bytes"`
	Batch        uint64  `json:"batch"`
	Record       string  `json:"record"`
	Group        uint32  `json:"group"`
	Slot         uint64  `json:"slot"`
	Ballot       string  `json:"ballot"`
	Kind         string  `json:"kind,omitempty"` // from here on of entries alone
	Term         string  `json:"term,omitempty"`
	Number       uint64  `json:"number,omitempty"`
	Region       string  `json:"region,omitempty"`
	Incarnation  string  `json:"incarnation,omitempty"`
	Session      uint64  `json:"session,omitempty"`
	Sequence     uint64  `json:"sequence,omitempty"`
	PayloadBytes *int    `json:"payload_bytes,omitempty"`
	Payload      *string `json:"payload,omitempty"`
	Base         *uint64 `json:"base,omitempty"` // of base and state alone: its slot
	Behind       bool    `json:"behind_damage"`
}

func recordViewOf(r slotlog.Inspected, payload payloadEncoding) recordView {
	v := recordView{
		File: r.File, Offset: r.Offset, Bytes: r.Size, Batch: r.Batch, Record: r.Kind, Group: uint32(r.Group), Slot: uint64(r.Slot),
		Ballot: r.Ballot.String(), Behind: r.Behind,
	}
	if r.Base != nil {
		base := uint64(r.Base.Slot)
		v.Base = &base
	}
	if r.Kind == "accept" || r.Kind == "learn" {
		v.Kind, v.Term, v.Number, v.Region = r.Entry.Kind.String(), r.Entry.Term.String(), r.Entry.Number, r.Entry.Region
		v.Incarnation, v.Session, v.Sequence = r.Entry.Incarnation.String(), r.Entry.Session, r.Entry.Sequence
		size := len(r.Entry.Payload)
		v.PayloadBytes = &size
		if payload != "" {
			text := payload.encode(r.Entry.Payload)
			v.Payload = &text
		}
	}
	return v
}

// payloadEncoding is how payloads are printed: not at all, as hex or as base64.
type payloadEncoding string

func (p *payloadEncoding) String() string { return string(*p) }
func (p *payloadEncoding) Type() string   { return "encoding" }

func (p *payloadEncoding) Set(s string) error {
	if s != "hex" && s != "base64" {
		return fmt.Errorf("%q is neither hex nor base64", s)
	}
	*p = payloadEncoding(s)
	return nil
}

func (p payloadEncoding) encode(b []byte) string {
	if p == "hex" {
		return hex.EncodeToString(b)
	}
	return base64.StdEncoding.EncodeToString(b)
}

// dumpFilter says which records are printed.
type dumpFilter struct {
	group    uint32
	anyGroup bool
	from, to uint64
}

// wants reports whether the record is to be printed: a range of slots leaves out
// those that are of no slot.
func (f dumpFilter) wants(r slotlog.Inspected) bool {
	if !f.anyGroup && r.Group != paxosgroup.GroupID(f.group) {
		return false
	}
	if f.from == 0 && f.to == 0 {
		return true
	}
	slot := uint64(r.Slot)
	return slot != 0 && slot >= f.from && (f.to == 0 || slot <= f.to)
}

func logDumpCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "dump DIR",
		Short: "Print the records in the files of a sidecar's log, offline",
		Long: `Print the records of a sidecar's log in the order in which they were written, so
with what was accepted and never chosen, and with what was accepted again.
` + "`paxosctl log read`" + ` prints the log that the regions agreed on.

` + offlineHelp + `

Of a damaged log all is printed that can be read; what lies behind damage is marked.
With -o json every record is one line of JSON.

` + exitCodesHelp,
		Example: `  paxosctl log dump /var/lib/quorate/log | less
  paxosctl log dump /var/lib/quorate/log --group 1 --from 4711 --to 4720
  paxosctl log dump /var/lib/quorate/log --payload base64 -o json | jq -r 'select(.slot == 4711) | .payload' | base64 -d`,
		Args: usage(cobra.ExactArgs(1)),
	}
	var filter dumpFilter
	var payload payloadEncoding
	cmd.Flags().Uint32Var(&filter.group, "group", 0, "print the records of this `group` alone")
	cmd.Flags().Uint64Var(&filter.from, "from", 0, "first `slot`; 0: the oldest")
	cmd.Flags().Uint64Var(&filter.to, "to", 0, "last `slot`; 0: the newest")
	cmd.Flags().Var(&payload, "payload", "print payloads in this `encoding`: hex or base64")
	output := addOutputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		filter.anyGroup = !cmd.Flags().Changed("group")
		if filter.to != 0 && filter.to < filter.from {
			return coded(exitUsage, "--to %d is below --from %d", filter.to, filter.from)
		}
		return quietly(dumpLog(cmd, args[0], filter, payload, *output))
	}
	return cmd
}

const dumpColumns = "%-20s  %9s  %-7s  %5s  %8s  %-8s  %-8s  %-8s  %8s  %-8s  %-16s  %-8s  %9s  %s"

func dumpLog(cmd *cobra.Command, dir string, filter dumpFilter, payload payloadEncoding, output format) error {
	w := bufio.NewWriter(cmd.OutOrStdout())
	encoder := json.NewEncoder(w)
	if output == formatTable {
		if err := printDumpLine(w, "FILE", "OFFSET", "RECORD", "GROUP", "SLOT", "BALLOT",
			"KIND", "TERM", "NUMBER", "REGION", "INCARNATION", "SESSION", "PAYLOAD", ""); err != nil {
			return err
		}
	}
	report, err := slotlog.Inspect(dir, func(r slotlog.Inspected) error {
		if err := cmd.Context().Err(); err != nil {
			return err
		}
		if !filter.wants(r) {
			return nil
		}
		v := recordViewOf(r, payload)
		if output == formatJSON {
			return encoder.Encode(v)
		}
		return printRecord(w, v)
	})
	if flushErr := w.Flush(); err == nil {
		err = flushErr
	}
	if errors.Is(err, syscall.EPIPE) {
		return err
	}
	if err != nil {
		return logError(dir, err)
	}
	if len(report.Damage) == 0 {
		return nil
	}
	for _, c := range report.Damage {
		fmt.Fprintf(cmd.ErrOrStderr(), "paxosctl: damage: %s: %s; %s\n", c.Where(), c.What, c.Behind)
	}
	return &codedError{code: exitDamaged, err: damage(1, 1)}
}

func printRecord(w io.Writer, v recordView) error {
	slot, number, session, size, more := "-", "-", "-", "-", ""
	if v.Slot != 0 {
		slot = fmt.Sprint(v.Slot)
	}
	if v.Number != 0 {
		number = fmt.Sprint(v.Number)
	}
	if v.Session != 0 {
		session = fmt.Sprintf("%d/%d", v.Session, v.Sequence)
	}
	if v.PayloadBytes != nil {
		size = fmt.Sprint(*v.PayloadBytes)
	}
	if v.Base != nil && v.Record == "state" {
		more = fmt.Sprintf("base %d ", *v.Base)
	}
	if v.Behind {
		more += "behind damage "
	}
	if v.Payload != nil {
		more += *v.Payload
	}
	return printDumpLine(w, v.File, fmt.Sprint(v.Offset), v.Record, fmt.Sprint(v.Group), slot, v.Ballot,
		dash(v.Kind), dash(v.Term), number, dash(v.Region), dash(v.Incarnation), session, size, more)
}

// printDumpLine prints the values of dumpColumns.
func printDumpLine(w io.Writer, values ...any) error {
	_, err := fmt.Fprintln(w, strings.TrimRight(fmt.Sprintf(dumpColumns, values...), " "))
	return err
}

// quietly takes it for no error that the reader of the output has seen enough.
func quietly(err error) error {
	if errors.Is(err, syscall.EPIPE) {
		return nil
	}
	return err
}
