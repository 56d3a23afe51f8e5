package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"quorate/deploy/sandbox/postgres"
	"quorate/deploy/sandbox/postgres/postgrestest"
)

// asProgram makes this test's binary be quorate itself.
const asProgram = "QUORATE_TEST_AS_PROGRAM"

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		main()
	}
	os.Exit(m.Run())
}

// process is a running `quorate run`.
type process struct {
	t     *testing.T
	cmd   *exec.Cmd
	admin string
	log   string // file
}

func startSidecar(t *testing.T, dsn string) *process {
	t.Helper()
	dir := t.TempDir()
	s := &process{t: t, log: filepath.Join(dir, "log")}
	var ports []int
	for range 2 {
		port, err := postgres.FreePort()
		if err != nil {
			t.Fatal(err)
		}
		ports = append(ports, port)
	}
	s.admin = fmt.Sprintf("127.0.0.1:%d", ports[0])
	file := filepath.Join(dir, "region.yaml")
	text := fmt.Sprintf(`cluster: demo
region: r1
data_dir: %s/data
postgres: {dsn: %q}
listen: {admin: %q, peer: "127.0.0.1:%d"}
regions:
  - {name: r1, peer: "127.0.0.1:%d"}
`, dir, dsn, s.admin, ports[1], ports[1])
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	log, err := os.Create(s.log)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	s.cmd = exec.Command(os.Args[0], "run", "--config", file)
	s.cmd.Env = append(os.Environ(), asProgram+"=1")
	s.cmd.Stderr = log
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if s.cmd.ProcessState == nil {
			_ = s.cmd.Process.Kill() // it may have ended by itself
			_ = s.cmd.Wait()
		}
		if t.Failed() {
			text, _ := os.ReadFile(s.log)
			t.Logf("the sidecar's log:\n%s", text)
		}
	})
	return s
}

// await asks path until it answers 200.
func (s *process) await(path string) {
	s.t.Helper()
	var last string
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		response, err := http.Get("http://" + s.admin + path)
		if err != nil {
			last = err.Error()
			continue
		}
		body, err := io.ReadAll(response.Body)
		response.Body.Close()
		if response.StatusCode == http.StatusOK && err == nil {
			return
		}
		last = response.Status + ": " + string(body)
	}
	s.t.Fatalf("%s does not answer 200; last: %s", path, last)
}

// end sends a signal and returns the exit code.
func (s *process) end(signal syscall.Signal) int {
	s.t.Helper()
	if err := s.cmd.Process.Signal(signal); err != nil {
		s.t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- s.cmd.Wait() }()
	select {
	case err := <-ended:
		if exit, ok := errors.AsType[*exec.ExitError](err); err != nil && !ok {
			s.t.Fatal(err)
		} else if ok {
			return exit.ExitCode()
		}
		return 0
	case <-time.After(15 * time.Second):
		_ = s.cmd.Process.Kill() // so that Wait returns
		<-ended
		s.t.Fatal("it did not end")
	}
	return -1
}

// A cluster of one region: the smallest that takes a COMMIT through the log.
func TestRunTakesWritesAndEndsAsAsked(t *testing.T) {
	server := postgrestest.Start(t, map[string]string{"wal_level": "logical"})
	postgrestest.Exec(t, postgrestest.Connect(t, server, "postgres"), "CREATE DATABASE app")
	s := startSidecar(t, server.DSN("app"))
	s.await("/healthz")
	s.await("/leader")
	s.await("/readyz")
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	conn := postgrestest.Connect(t, server, "app")
	for _, statement := range []string{"CREATE TABLE t (id int PRIMARY KEY)", "INSERT INTO t VALUES (1)"} {
		if _, err := conn.Exec(ctx, statement); err != nil {
			t.Fatalf("%s: %v", statement, err)
		}
	}
	if code := s.end(syscall.SIGTERM); code != exitOK {
		t.Errorf("SIGTERM gave exit code %d", code)
	}
	text, err := os.ReadFile(s.log)
	if err != nil {
		t.Fatal(err)
	}
	decoder := json.NewDecoder(bytes.NewReader(text))
	for {
		var line map[string]any
		err := decoder.Decode(&line)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil || line["region"] != "r1" || line["level"] == nil {
			t.Fatalf("a line of the log is not what it should be: %v, %v", line, err)
		}
	}
}
