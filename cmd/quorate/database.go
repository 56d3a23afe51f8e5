package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/jackc/pgx/v5"
	"github.com/spf13/cobra"

	"quorate/replication/catalog"
	"quorate/sidecar/config"
)

// connect opens a session that neither waits for the sidecar, which may not be
// running, nor is taken for a client's, nor minds that the region's default is
// to read only.
func connect(ctx context.Context, cfg config.Config) (*pgx.Conn, error) {
	if !cfg.Own().HasDatabase() {
		return nil, fmt.Errorf("region %s is a witness: it has no database", cfg.Region)
	}
	parsed, err := pgx.ParseConfig(cfg.Postgres.DSN)
	if err != nil {
		return nil, fmt.Errorf("postgres.dsn: %w", err)
	}
	parsed.RuntimeParams["application_name"] = catalog.ApplicationName + " operator"
	parsed.RuntimeParams["synchronous_commit"] = "local"
	parsed.RuntimeParams["default_transaction_read_only"] = "off"
	conn, err := pgx.ConnectConfig(ctx, parsed)
	if err != nil {
		return nil, fmt.Errorf("connect to this region's PostgreSQL (postgres.dsn): %w", err)
	}
	return conn, nil
}

// withDatabase runs f with a session of its own.
func withDatabase(ctx context.Context, cfg config.Config, f func(*pgx.Conn) error) error {
	conn, err := connect(ctx, cfg)
	if err != nil {
		return err
	}
	err = f(conn)
	return errors.Join(err, conn.Close(context.WithoutCancel(ctx)))
}

// checkServer prints what is wrong with the server and how to mend it.
func checkServer(ctx context.Context, conn *pgx.Conn, out io.Writer) error {
	info, problems, err := catalog.Check(ctx, conn, catalog.CheckOptions{})
	if err != nil {
		return err
	}
	fatal := 0
	for _, p := range problems {
		kind := "warning"
		if p.Fatal {
			kind = "error"
			fatal++
		}
		fmt.Fprintf(out, "%s: %s: %s\n  mend: %s\n", kind, p.Name, p.Text, p.Mend)
	}
	if fatal > 0 {
		return fmt.Errorf("%w: %d errors", errUnfit, fatal)
	}
	fmt.Fprintf(out, "server: PostgreSQL %d.%d, database %s: fit\n", info.Version/10000, info.Version%10000, info.Database)
	return nil
}

func checkCommand() *cobra.Command {
	return command("check", "Check the configuration and the server",
		`Check the configuration, then the server and the database that it names. Every
fault is told with its mend. Nothing is changed.`,
		`  quorate check --config /etc/quorate/region.yaml`,
		func(cmd *cobra.Command, cfg config.Config) error {
			out := cmd.OutOrStdout()
			for _, w := range cfg.Warnings() {
				fmt.Fprintf(out, "warning: %s\n", w)
			}
			fmt.Fprintf(out, "configuration: region %s of cluster %s, %d regions: fit\n", cfg.Region, cfg.Cluster, len(cfg.Regions))
			if !cfg.Own().HasDatabase() {
				fmt.Fprintln(out, "a witness has no database: there is no more to check")
				return nil
			}
			return withDatabase(cmd.Context(), cfg, func(conn *pgx.Conn) error {
				if err := checkServer(cmd.Context(), conn, out); err != nil {
					return err
				}
				id, err := catalog.ReadIdentity(cmd.Context(), conn)
				switch {
				case errors.Is(err, catalog.ErrNotInstalled):
					fmt.Fprintln(out, "schema quorate: not installed; the sidecar does so when it joins or makes the cluster")
				case err != nil:
					return err
				default:
					fmt.Fprintf(out, "schema quorate: version %d, region %s, incarnation %016x\n", id.Version, id.Region, uint64(id.Incarnation))
				}
				return nil
			})
		})
}

func installCommand() *cobra.Command {
	return command("install", "Bring what is installed in the database up to this version",
		`Check the server, then bring schema quorate, the publication and the fence on
every table up to this version. It can be repeated.

A database in which nothing is installed yet is left as it is: what is installed
names the cluster's identity and the life of the database, so the sidecar itself
installs it when it makes or joins the cluster.`,
		`  quorate install --config /etc/quorate/region.yaml`,
		func(cmd *cobra.Command, cfg config.Config) error {
			ctx, out := cmd.Context(), cmd.OutOrStdout()
			return withDatabase(ctx, cfg, func(conn *pgx.Conn) error {
				if err := checkServer(ctx, conn, out); err != nil {
					return err
				}
				before, err := catalog.ReadIdentity(ctx, conn)
				if errors.Is(err, catalog.ErrNotInstalled) {
					fmt.Fprintln(out, "nothing is installed yet: `quorate run` does so when it makes or joins the cluster")
					return nil
				}
				if err != nil {
					return err
				}
				if err := catalog.Install(ctx, conn, catalog.Options{ClusterID: before.ClusterID, Region: cfg.Region, Shard: before.Shard}); err != nil {
					return err
				}
				after, err := catalog.ReadIdentity(ctx, conn)
				if err != nil {
					return err
				}
				fmt.Fprintf(out, "schema quorate: version %d, was %d\n", after.Version, before.Version)
				return nil
			})
		})
}

func uninstallCommand() *cobra.Command {
	return command("uninstall", "Take everything of Quorate's out of the database",
		`Take everything of Quorate's out of the database and the server: triggers,
schemas, publication, replication slots and origins, and the settings it made.
Rows of users stay. Stop the sidecar before; from then on a COMMIT waits for
nobody, and no other region has what is written. It can be repeated.`,
		`  systemctl stop quorate && quorate uninstall --config /etc/quorate/region.yaml`,
		func(cmd *cobra.Command, cfg config.Config) error {
			ctx := cmd.Context()
			return withDatabase(ctx, cfg, func(conn *pgx.Conn) error {
				if err := catalog.Uninstall(ctx, conn, catalog.UninstallOptions{}); err != nil {
					return err
				}
				fmt.Fprintf(cmd.OutOrStdout(), "uninstalled from database %s; %s is of no use any more, remove it\n", conn.Config().Database, cfg.DataDir)
				return nil
			})
		})
}
