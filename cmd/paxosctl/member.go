package main

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"quorate/sidecar/admin/adminpb"
)

// memberView is one region's place in the group. Its JSON field names are stable.
type memberView struct {
	Region    string `json:"region"`
	ReplicaID uint32 `json:"replica_id"`
	Kind      string `json:"kind"`
	Reachable bool   `json:"reachable"`
	Healthy   bool   `json:"healthy"`
}

// membersView is the membership. Its JSON field names are stable.
type membersView struct {
	Phase1Quorum      uint32       `json:"phase1_quorum"`
	Phase2Quorum      uint32       `json:"phase2_quorum"`
	DurabilityRegions uint32       `json:"durability_regions"`
	Members           []memberView `json:"members"`
}

// changesView is what a change came to. Its JSON field names are stable.
type changesView struct {
	DryRun  bool     `json:"dry_run"`
	Changes []string `json:"changes"`
}

func memberCommand(a *addressing) *cobra.Command {
	cmd := &cobra.Command{
		Use:     "member",
		Aliases: []string{"members"},
		Short:   "Show and change who votes, and the quorums",
		Long: `Show and change the members of the group, their kinds (voter, witness, learner) and
the sizes of the quorums.

What they are to be stands in region.yaml: regions[].kind,
consensus.phase1_quorum, consensus.phase2_quorum and durability_regions. To change
them, change the file in every region, restart the sidecars one after the other,
and apply.`,
		Args: usage(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	a.addFlags(cmd)
	cmd.AddCommand(memberListCommand(a), memberApplyCommand(a))
	return cmd
}

func memberListCommand(a *addressing) *cobra.Command {
	cmd := &cobra.Command{
		Use:     "list",
		Short:   "List the members and the quorums in force",
		Long:    "List the members and the quorums in force.\n\n" + addressingHelp + "\n\n" + exitCodesHelp,
		Example: "  paxosctl member list\n  paxosctl member list -o json",
		Args:    usage(cobra.NoArgs),
	}
	output := addOutputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		v, err := a.view(cmd, all)
		if err != nil {
			return err
		}
		m := membersView{Phase1Quorum: v.Phase1Quorum, Phase2Quorum: v.Phase2Quorum, DurabilityRegions: v.DurabilityRegions}
		rows := [][]string{{"REGION", "REPLICA", "KIND", "HEALTH"}}
		for _, r := range v.Regions {
			m.Members = append(m.Members, memberView{Region: r.Name, ReplicaID: r.ReplicaID, Kind: r.Kind, Reachable: r.Reachable, Healthy: r.Healthy})
			health := r.Health
			if !r.Reachable {
				health = "unreachable: " + health
			}
			rows = append(rows, []string{r.Name, strconv.FormatUint(uint64(r.ReplicaID), 10), dash(r.Kind), health})
		}
		if *output == formatJSON {
			return printJSON(cmd.OutOrStdout(), m)
		}
		if _, err := fmt.Fprintf(cmd.OutOrStdout(), "%d voting regions: phase 1 (electing a leader) %d, phase 2 (committing) %d; %d may be lost for good\n\n",
			v.Voters, m.Phase1Quorum, m.Phase2Quorum, m.DurabilityRegions); err != nil {
			return err
		}
		return printTable(cmd.OutOrStdout(), rows)
	}
	return cmd
}

func memberApplyCommand(a *addressing) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "apply",
		Short: "Make the membership what the leader's region.yaml says",
		Long: `Make the membership what the leader's region.yaml says: kinds, regions that are no
longer listed, and quorums, all in one change. Old and new quorums both decide
while it is under way, so that nothing is lost if it is broken off. A region that
is new is not added here: its sidecar asks to join when it is started.

` + addressingHelp + "\n\n" + exitCodesHelp,
		Example: "  paxosctl member apply --dry-run\n  paxosctl member apply",
		Args:    usage(cobra.NoArgs),
	}
	dryRun := cmd.Flags().Bool("dry-run", false, "only tell what would change")
	timeout := cmd.Flags().Duration("timeout", 30*time.Second, "how long to wait")
	output := addOutputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		v, err := a.view(cmd, leaderKnown)
		if err != nil {
			return err
		}
		if v.Leader == "" {
			return coded(exitNoLeader, "no region leads at the moment, so none can change the membership; paxosctl status tells why")
		}
		conn, err := a.dialLeader(cmd, v.Leader)
		if err != nil {
			return err
		}
		defer conn.Close()
		ctx, cancel := context.WithTimeout(cmd.Context(), *timeout)
		defer cancel()
		r, err := adminpb.NewAdminClient(conn).MemberApply(ctx, &adminpb.MemberApplyRequest{DryRun: *dryRun})
		if err != nil {
			return fromRPC("change the membership", err)
		}
		if *output == formatJSON {
			return printJSON(cmd.OutOrStdout(), changesView{DryRun: *dryRun, Changes: append([]string{}, r.GetChanges()...)})
		}
		if len(r.GetChanges()) == 0 {
			_, err = fmt.Fprintln(cmd.OutOrStdout(), "nothing to change: the membership is what region.yaml of the leader says")
		}
		for _, c := range r.GetChanges() {
			if _, err = fmt.Fprintln(cmd.OutOrStdout(), c); err != nil {
				break
			}
		}
		return err
	}
	return cmd
}
