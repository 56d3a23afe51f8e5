package sandbox

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"quorate/deploy/jaeger"
)

func buildJaeger(ctx context.Context) (string, error) { return jaeger.Binary(ctx) }

func (s *Supervisor) jaegerPIDFile() string { return filepath.Join(s.dir, "jaeger.pid") }

// startJaeger runs Jaeger, its traces in memory, and returns when it answers.
func (s *Supervisor) startJaeger(ctx context.Context) error {
	if s.jaeger.running() {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, answerTimeout)
	defer cancel()
	ports := s.description.JaegerPorts
	cmd := exec.Command(s.jaegerBin,
		"--collector.otlp.grpc.host-port="+address(ports["otlp"]),
		"--collector.otlp.http.host-port="+address(ports["otlp_http"]),
		"--collector.http-server.host-port="+address(ports["collector_http"]),
		"--collector.grpc-server.host-port="+address(ports["collector_grpc"]),
		"--query.http-server.host-port="+address(ports["query"]),
		"--query.grpc-server.host-port="+address(ports["query_grpc"]),
		"--admin.http.host-port="+address(ports["admin"]),
		"--memory.max-traces=50000",
	)
	cmd.Env = append(os.Environ(), "SPAN_STORAGE_TYPE=memory")
	logFile := filepath.Join(s.dir, "jaeger.log")
	p, err := launch(s.spawner, cmd, logFile, s.jaegerPIDFile())
	if err != nil {
		return err
	}
	s.jaeger = p
	for {
		if answers(ctx, "http://"+address(ports["query"])+"/api/services") {
			return nil
		}
		select {
		case <-p.done:
			return fmt.Errorf("it ended: %v\n%s", p.err, logTail(logFile))
		case <-ctx.Done():
			return fmt.Errorf("it does not answer: %w\n%s", ctx.Err(), logTail(logFile))
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// stopJaeger ends it at once: its traces are in memory, and asked to end it may
// wait for its clients.
func (s *Supervisor) stopJaeger() {
	s.jaeger.kill()
	_ = forget(s.jaegerPIDFile()) // what is recorded there has ended, and so would be let be
}

func answers(ctx context.Context, url string) bool {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return false
	}
	res, err := adminClient.Do(req)
	if err != nil {
		return false
	}
	res.Body.Close()
	return res.StatusCode == http.StatusOK
}
