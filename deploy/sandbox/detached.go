package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"
)

// AwaitDetached returns when the sandbox that a supervisor process of its own
// starts in dir is ready. ended is closed at that process's end, and logFile is what
// it prints; its lines go to progress meanwhile.
func AwaitDetached(ctx context.Context, dir string, ended <-chan struct{}, logFile string, progress func(string)) error {
	log, err := os.Open(logFile)
	if err != nil {
		return err
	}
	defer log.Close()
	var pending strings.Builder
	follow := func() {
		_, _ = io.Copy(&pending, log) // from where the last one ended; nothing rests on it
		text := pending.String()
		pending.Reset()
		for {
			line, rest, ok := strings.Cut(text, "\n")
			if !ok {
				pending.WriteString(line)
				return
			}
			progress(line)
			text = rest
		}
	}
	ready := make(chan error, 1)
	asking := false
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for {
		follow()
		if !asking {
			if c, err := Connect(dir); err == nil {
				asking = true
				go func() { ready <- c.AwaitReady(ctx) }() // ends with ctx at the latest
			}
		}
		select {
		case err := <-ready:
			follow()
			return err
		case <-ended:
			follow()
			return errors.New("the sandbox did not start")
		case <-ctx.Done():
			return fmt.Errorf("wait for the sandbox: %w", ctx.Err())
		case <-time.After(50 * time.Millisecond):
		}
	}
}
