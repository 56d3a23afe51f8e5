package sandbox

import (
	"os/exec"
	"runtime"
	"syscall"
)

// spawner starts processes that the kernel ends when this process ends, even by
// kill -9. The kernel counts the death of the thread that started a process, so
// all are started from one thread, which lives until close.
type spawner struct {
	requests chan spawnRequest
	ended    chan struct{}
}

type spawnRequest struct {
	cmd    *exec.Cmd
	result chan error
}

func newSpawner() *spawner {
	s := &spawner{requests: make(chan spawnRequest), ended: make(chan struct{})}
	go s.run()
	return s
}

func (s *spawner) run() {
	defer close(s.ended)
	runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
	for r := range s.requests {
		r.result <- r.cmd.Start()
	}
}

// start is cmd.Start; atDeath is what the process gets when this one ends.
func (s *spawner) start(cmd *exec.Cmd, atDeath syscall.Signal) error {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Pdeathsig = atDeath
	// Out of reach of the terminal's Ctrl-C: the supervisor ends them in order.
	cmd.SysProcAttr.Setsid = true
	r := spawnRequest{cmd, make(chan error, 1)}
	s.requests <- r
	return <-r.result
}

// close ends the thread, and with it whatever it started and still runs.
func (s *spawner) close() {
	close(s.requests)
	<-s.ended
}
