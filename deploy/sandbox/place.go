package sandbox

import (
	"crypto/sha256"
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"
)

// postgresRoot returns the directory under which the servers of a sandbox keep
// theirs: dir, or, when root runs the sandbox and user postgres cannot enter
// dir, one under /var/tmp.
func postgresRoot(dir string) (string, error) {
	if os.Geteuid() != 0 {
		return dir, nil
	}
	u, err := user.Lookup("postgres")
	if err != nil {
		return "", fmt.Errorf("as root the servers run as user postgres: %w (deploy/setup.sh installs PostgreSQL, which makes it)", err)
	}
	uid, err := strconv.Atoi(u.Uid)
	if err != nil {
		return "", err
	}
	gid, err := strconv.Atoi(u.Gid)
	if err != nil {
		return "", err
	}
	enterable, err := canEnter(dir, uint32(uid), uint32(gid))
	if err != nil {
		return "", err
	}
	if enterable {
		return dir, nil
	}
	sum := sha256.Sum256([]byte(dir))
	return fmt.Sprintf("/var/tmp/quorate-%x", sum[:6]), nil
}

// canEnter reports whether a user may search dir and every directory above it.
// Groups beyond the primary one and access lists are not asked: a false no only
// puts the servers under /var/tmp.
func canEnter(dir string, uid, gid uint32) (bool, error) {
	for at := dir; ; at = filepath.Dir(at) {
		info, err := os.Stat(at)
		if err != nil {
			return false, err
		}
		st := info.Sys().(*syscall.Stat_t)
		bit := os.FileMode(0o001)
		switch {
		case st.Uid == uid:
			bit = 0o100
		case st.Gid == gid:
			bit = 0o010
		}
		if info.Mode().Perm()&bit == 0 {
			return false, nil
		}
		if at == filepath.Dir(at) {
			return true, nil
		}
	}
}
