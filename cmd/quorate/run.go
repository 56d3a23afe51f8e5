package main

import (
	"errors"
	"log/slog"
	"os"

	"github.com/spf13/cobra"

	"quorate/sidecar"
	"quorate/sidecar/config"
)

func runCommand() *cobra.Command {
	return command("run", "Run the sidecar",
		`Run the sidecar until SIGTERM or SIGINT. The first one ends it in order: the
fence is closed and leadership given up; a second one ends it at once, which is
as safe and takes the others a lease longer to notice.

It logs to stderr.`,
		`  quorate run --config /etc/quorate/region.yaml`,
		func(cmd *cobra.Command, cfg config.Config) error {
			log := newLogger(cfg)
			for _, w := range cfg.Warnings() {
				log.Warn(w, "region", cfg.Region)
			}
			err := sidecar.Run(cmd.Context(), cfg, log)
			if cmd.Context().Err() != nil && errors.Is(err, cmd.Context().Err()) {
				return nil // it ended because it was asked to
			}
			return err
		})
}

// newLogger logs to stderr as the configuration says.
func newLogger(cfg config.Config) *slog.Logger {
	level := map[string]slog.Level{"debug": slog.LevelDebug, "info": slog.LevelInfo, "warn": slog.LevelWarn, "error": slog.LevelError}
	options := &slog.HandlerOptions{Level: level[cfg.Logging.Level]}
	var handler slog.Handler = slog.NewJSONHandler(os.Stderr, options)
	if cfg.Logging.Format == "text" {
		handler = slog.NewTextHandler(os.Stderr, options)
	}
	return slog.New(handler)
}
