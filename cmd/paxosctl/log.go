package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"quorate/sidecar/admin/adminpb"
)

// entryView is one entry of the log. Its JSON field names are stable.
type entryView struct {
	Slot        uint64      `json:"slot"`
	Kind        string      `json:"kind"`
	Term        string      `json:"term"`
	Number      uint64      `json:"number"`
	Region      string      `json:"region"`
	Incarnation string      `json:"incarnation"`
	Verdict     string      `json:"verdict"`
	Time        *time.Time  `json:"time"` // null: the entry has none
	Xid         uint64      `json:"xid"`
	EndLSN      string      `json:"end_lsn"`
	Tables      []tableView `json:"tables"`
	Bytes       uint64      `json:"bytes"`
	Trace       string      `json:"trace"`
	Detail      string      `json:"detail"`
	Changes     []string    `json:"changes,omitempty"`
}

type tableView struct {
	Table string `json:"table"`
	Rows  uint64 `json:"rows"`
}

func entryViewOf(e *adminpb.LogEntry) entryView {
	v := entryView{
		Slot:        e.GetSlot(),
		Kind:        e.GetKind(),
		Term:        fmt.Sprintf("%d.%d", e.GetTermCounter(), e.GetTermReplica()),
		Number:      e.GetNumber(),
		Region:      e.GetRegion(),
		Incarnation: fmt.Sprintf("%016x", e.GetIncarnation()),
		Verdict:     e.GetVerdict(),
		Xid:         e.GetXid(),
		EndLSN:      pglogrepl.LSN(e.GetEndLsn()).String(),
		Tables:      []tableView{},
		Bytes:       e.GetBytes(),
		Trace:       e.GetTrace(),
		Detail:      e.GetDetail(),
		Changes:     e.GetChanges(),
	}
	if e.GetTime() != nil {
		t := e.GetTime().AsTime()
		v.Time = &t
	}
	for _, t := range e.GetTables() {
		v.Tables = append(v.Tables, tableView{Table: t.GetTable(), Rows: t.GetRows()})
	}
	return v
}

func logCommand(a *addressing) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "log",
		Short: "Look into the log that all regions share, or the files of one sidecar",
		Args:  usage(cobra.NoArgs),
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	a.addFlags(cmd)
	cmd.AddCommand(logReadCommand(a), logVerifyCommand(), logDumpCommand())
	return cmd
}

func logReadCommand(a *addressing) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "read",
		Short: "Print entries in readable form",
		Long: `Print the chosen entries of the log in slot order, void ones included. The first
region that answers is read. With -o json every entry is one line of JSON.

` + addressingHelp + "\n\n" + exitCodesHelp,
		Example: `  paxosctl log read
  paxosctl log read --from 4711 --limit 1 --changes
  paxosctl log read --follow -o json | jq 'select(.verdict == "void")'`,
		Args: usage(cobra.NoArgs),
	}
	request := &adminpb.LogReadRequest{}
	cmd.Flags().Uint64Var(&request.From, "from", 0, "first `slot`; 0: the oldest that is held")
	cmd.Flags().Uint32Var(&request.Limit, "limit", 0, "print at most so many entries; 0: no limit")
	cmd.Flags().BoolVar(&request.Changes, "changes", false, "print every row's change")
	cmd.Flags().BoolVar(&request.Follow, "follow", false, "wait for more at the end")
	output := addOutputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		return readLog(cmd, a, request, *output)
	}
	return cmd
}

func readLog(cmd *cobra.Command, a *addressing, request *adminpb.LogReadRequest, output format) error {
	endpoints, err := a.endpoints(cmd)
	if err != nil {
		return err
	}
	answers := ask(cmd.Context(), endpoints, first, func(ctx context.Context, c adminpb.AdminClient) (*adminpb.VersionResponse, error) {
		return c.Version(ctx, &adminpb.VersionRequest{})
	})
	for _, answer := range answers {
		if answer.err == nil {
			return readLogAt(cmd, answer.endpoint, request, output)
		}
	}
	return unreachable(answers)
}

func readLogAt(cmd *cobra.Command, at endpoint, request *adminpb.LogReadRequest, output format) error {
	conn, err := dial(at)
	if err != nil {
		return err
	}
	defer conn.Close()
	stream, err := adminpb.NewAdminClient(conn).LogRead(cmd.Context(), request)
	if err != nil {
		return fromRPC("read the log", err)
	}
	out := cmd.OutOrStdout()
	if output == formatTable {
		if err := printEntryHeading(out); err != nil {
			return err
		}
	}
	for {
		e, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if cmd.Context().Err() != nil && status.Code(err) == codes.Canceled {
			return nil // the user has seen enough
		}
		if err != nil {
			return fromRPC("read the log", err)
		}
		v := entryViewOf(e)
		if output == formatJSON {
			err = json.NewEncoder(out).Encode(v)
		} else {
			err = printEntry(out, v)
		}
		if err != nil {
			return err
		}
	}
}

// The columns have fixed widths, as entries are printed while they come.
const entryColumns = "%8s  %-11s  %-9s  %-8s  %6s  %-8s  %-23s  %10s  %9s  %s"

func printEntryHeading(w io.Writer) error {
	_, err := fmt.Fprintf(w, entryColumns+"\n", "SLOT", "KIND", "VERDICT", "TERM", "NUMBER", "REGION", "TIME", "XID", "BYTES", "WHAT")
	return err
}

func printEntry(w io.Writer, v entryView) error {
	when, xid, number := "-", "-", "-"
	if v.Time != nil {
		when = v.Time.Format("2006-01-02 15:04:05.000")
	}
	if v.Xid != 0 {
		xid = fmt.Sprint(v.Xid)
	}
	if v.Number != 0 {
		number = fmt.Sprint(v.Number)
	}
	var what []string
	for _, t := range v.Tables {
		what = append(what, fmt.Sprintf("%s: %d", t.Table, t.Rows))
	}
	if v.Detail != "" {
		what = append(what, v.Detail)
	}
	if v.Trace != "" {
		what = append(what, "trace "+v.Trace)
	}
	line := fmt.Sprintf(entryColumns, fmt.Sprint(v.Slot), v.Kind, v.Verdict, v.Term, number, v.Region, when, xid,
		fmt.Sprint(v.Bytes), strings.Join(what, ", "))
	if _, err := fmt.Fprintln(w, strings.TrimRight(line, " ")); err != nil {
		return err
	}
	for _, change := range v.Changes {
		if _, err := fmt.Fprintf(w, "          %s\n", change); err != nil {
			return err
		}
	}
	return nil
}
