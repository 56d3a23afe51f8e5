package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"quorate/sidecar/admin/adminpb"
)

// leaderView is where writes go. Its JSON field names are stable.
type leaderView struct {
	Region   string `json:"region"`
	Writable bool   `json:"writable"`
	Ballot   string `json:"ballot"`
}

// transferView is what a hand-over came to. Its JSON field names are stable.
type transferView struct {
	From    string   `json:"from"`
	To      string   `json:"to"`
	PauseMS *float64 `json:"pause_ms"` // null: not measured
}

// leaderKnown stops waiting when most regions have answered and the highest
// ballot among them is that of a region that takes writes: a newer leader would
// need the promise of one of them, and it would tell of that ballot.
func leaderKnown(answers []statusAnswer) bool {
	count, leads := 0, false
	var highest regionView
	for _, a := range answers {
		if a.err != nil {
			continue
		}
		count++
		r := viewOf(own(a.value))
		if count == 1 || highest.below(r) {
			highest, leads = r, false
		}
		leads = leads || r.Writable && !r.below(highest)
	}
	return leads && 2*count > len(answers)
}

func leaderCommand(a *addressing) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "leader",
		Short: "Print the region that leads",
		Long: `Print the bare name of the region that leads: where writes go. A region that
believes to lead counts only if no region of a higher ballot does.

` + addressingHelp + "\n\n" + exitCodesHelp,
		Example: `  paxosctl leader
  psql "$(paxosctl dev dsn $(paxosctl leader))"
  paxosctl leader transfer --to r2`,
		Args: usage(cobra.NoArgs),
	}
	a.addFlags(cmd)
	output := addOutputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		v, err := a.view(cmd, leaderKnown)
		if err != nil {
			return err
		}
		for _, r := range v.Regions {
			if r.Name != v.Leader {
				continue
			}
			if *output == formatJSON {
				return printJSON(cmd.OutOrStdout(), leaderView{Region: r.Name, Writable: r.Writable, Ballot: r.Ballot})
			}
			_, err := fmt.Fprintln(cmd.OutOrStdout(), r.Name)
			return err
		}
		return coded(exitNoLeader, "no region leads at the moment; paxosctl status tells why")
	}
	cmd.AddCommand(leaderTransferCommand(a))
	return cmd
}

func leaderTransferCommand(a *addressing) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "transfer --to REGION",
		Short: "Hand leadership to a region",
		Long: `Hand leadership to a region and wait until it takes writes. Nothing that was
acknowledged is lost; writes under way at the old leader end or fail honestly.

It tells how long writes paused, from when the old leader began to refuse them to
when it saw the new one take them. Seeing that takes as long as the regions take
to answer, so the figure is that much too long.

` + addressingHelp + "\n\n" + exitCodesHelp,
		Example: `  paxosctl leader transfer --to r2
  paxosctl leader transfer --to r2 --timeout 10s -o json`,
		Args: usage(cobra.NoArgs),
	}
	to := cmd.Flags().String("to", "", "`region` that shall lead")
	timeout := cmd.Flags().Duration("timeout", time.Minute, "how long to wait")
	output := addOutputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if *to == "" {
			return coded(exitUsage, "--to is missing: which region shall lead?")
		}
		view, err := transfer(cmd, a, *to, *timeout)
		if err != nil {
			return err
		}
		if *output == formatJSON {
			return printJSON(cmd.OutOrStdout(), view)
		}
		out := cmd.OutOrStdout()
		switch {
		case view.From == view.To:
			_, err = fmt.Fprintf(out, "%s leads already\n", view.To)
		case view.PauseMS == nil:
			_, err = fmt.Fprintf(out, "%s leads, %s led before; the pause was not measured\n", view.To, view.From)
		default:
			_, err = fmt.Fprintf(out, "%s leads, %s led before; writes paused for %.1f ms\n", view.To, view.From, *view.PauseMS)
		}
		return err
	}
	return cmd
}

// transfer asks the leader itself where its address is known: it sees best when
// its writes paused.
func transfer(cmd *cobra.Command, a *addressing, to string, timeout time.Duration) (transferView, error) {
	v, err := a.view(cmd, leaderKnown)
	if err != nil {
		return transferView{}, err
	}
	if v.Leader == "" {
		return transferView{}, coded(exitNoLeader, "no region leads at the moment, so none can hand over; paxosctl status tells why")
	}
	conn, err := a.dialLeader(cmd, v.Leader)
	if err != nil {
		return transferView{}, err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(cmd.Context(), timeout)
	defer cancel()
	r, err := adminpb.NewAdminClient(conn).Transfer(ctx, &adminpb.TransferRequest{To: to})
	if err != nil {
		return transferView{}, fromRPC("hand leadership to "+to, err)
	}
	view := transferView{From: r.GetFrom(), To: to}
	if r.GetPauseMeasured() {
		view.PauseMS = &r.PauseMs
	}
	return view, nil
}
