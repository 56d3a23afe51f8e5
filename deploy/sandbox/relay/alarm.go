package relay

import (
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// alarm waits to a given instant with the accuracy of the kernel's timers
// (timerfd), through the runtime's poller: no thread is held. One waiter at a
// time; close may be called meanwhile and ends the wait.
type alarm struct{ file *os.File }

func newAlarm() (*alarm, error) {
	fd, err := unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_NONBLOCK|unix.TFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("create a timer: %w", err)
	}
	return &alarm{file: os.NewFile(uintptr(fd), "timerfd")}, nil
}

// sleepUntil returns at t, or with an error once the alarm is closed.
func (a *alarm) sleepUntil(t time.Time) error {
	var expirations [8]byte
	for {
		left := time.Until(t)
		if left <= 0 {
			return nil
		}
		spec := unix.ItimerSpec{Value: unix.NsecToTimespec(int64(left))}
		conn, err := a.file.SyscallConn()
		if err != nil {
			return err
		}
		var set error
		if err := conn.Control(func(fd uintptr) { set = unix.TimerfdSettime(int(fd), 0, &spec, nil) }); err != nil {
			return err
		}
		if set != nil {
			return set
		}
		if _, err := a.file.Read(expirations[:]); err != nil {
			return err
		}
	}
}

func (a *alarm) close() { a.file.Close() }
