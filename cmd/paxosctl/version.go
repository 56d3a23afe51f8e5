package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"quorate/sidecar/admin"
	"quorate/sidecar/admin/adminpb"
)

// versionView is which builds are at work. Its JSON field names are stable.
type versionView struct {
	Paxosctl buildView   `json:"paxosctl"`
	Sidecars []buildView `json:"sidecars"` // those that answer
}

type buildView struct {
	Region    string `json:"region,omitempty"`
	Version   string `json:"version"`
	Commit    string `json:"commit"`
	GoVersion string `json:"go_version"`
	Protocol  uint32 `json:"protocol,omitempty"`
	Postgres  string `json:"postgres,omitempty"`
}

func versionCommand(a *addressing) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "version",
		Short: "Print the versions of paxosctl and of the sidecars that answer",
		Long: `Print the versions of paxosctl and of the sidecars that answer. It is no error
that none does.

` + addressingHelp + "\n\n" + exitCodesHelp,
		Example: `  paxosctl version
  paxosctl version --addr 10.1.0.5:7461 -o json`,
		Args: usage(cobra.NoArgs),
	}
	a.addFlags(cmd)
	output := addOutputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		v, err := versions(cmd, a)
		if err != nil {
			return err
		}
		if *output == formatJSON {
			return printJSON(cmd.OutOrStdout(), v)
		}
		rows := [][]string{{"PROGRAM", "VERSION", "COMMIT", "GO", "PROTOCOL", "POSTGRESQL"},
			{"paxosctl", v.Paxosctl.Version, v.Paxosctl.Commit, v.Paxosctl.GoVersion, "-", "-"}}
		for _, s := range v.Sidecars {
			rows = append(rows, []string{"quorate " + s.Region, s.Version, s.Commit, s.GoVersion, fmt.Sprint(s.Protocol), s.Postgres})
		}
		return printTable(cmd.OutOrStdout(), rows)
	}
	return cmd
}

func versions(cmd *cobra.Command, a *addressing) (versionView, error) {
	build := admin.Build()
	v := versionView{
		Paxosctl: buildView{Version: build.Version, Commit: build.Commit, GoVersion: build.GoVersion},
		Sidecars: []buildView{},
	}
	endpoints, err := a.endpoints(cmd)
	if err != nil {
		return versionView{}, err
	}
	for _, answer := range ask(cmd.Context(), endpoints, all, func(ctx context.Context, c adminpb.AdminClient) (*adminpb.VersionResponse, error) {
		return c.Version(ctx, &adminpb.VersionRequest{})
	}) {
		if answer.err != nil {
			continue
		}
		s := answer.value
		region := answer.endpoint.Name
		if region == "" {
			region = answer.endpoint.Admin
		}
		v.Sidecars = append(v.Sidecars, buildView{
			Region:    region,
			Version:   s.GetVersion(),
			Commit:    s.GetCommit(),
			GoVersion: s.GetGoVersion(),
			Protocol:  s.GetProtocol(),
			Postgres:  s.GetPostgres(),
		})
	}
	return v, nil
}
