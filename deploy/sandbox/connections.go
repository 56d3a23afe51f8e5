package sandbox

import (
	"encoding/hex"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"quorate/deploy/sandbox/postgres"
)

// Connection is an established TCP connection of one of a sandbox's processes.
type Connection struct {
	Region  string `json:"region"`
	Process Part   `json:"process"`
	Local   string `json:"local"`
	Remote  string `json:"remote"`
	// Called says that the process made the connection, rather than took it.
	Called bool `json:"called"`
}

// Connections reads from the kernel which connections the sidecars and servers
// of a running sandbox hold. What a connection leads to follows from its
// addresses: those of a region's ports in Regions, of relays in Links.
func (st Status) Connections() ([]Connection, error) {
	sockets, listening, err := tcpSockets()
	if err != nil {
		return nil, err
	}
	var out []Connection
	for _, r := range st.Regions {
		processes := map[Part][]int{}
		if r.SidecarPID != 0 {
			processes[Sidecar] = []int{r.SidecarPID}
		}
		if r.PostgresPID != 0 {
			processes[Postgres] = append(postgres.Children(r.PostgresPID), r.PostgresPID)
		}
		for part, pids := range processes {
			for _, pid := range pids {
				inodes, err := socketInodes(pid)
				if err != nil {
					return nil, fmt.Errorf("read the connections of process %d of %s: %w", pid, r.Region, err)
				}
				for _, inode := range inodes {
					s, ok := sockets[inode]
					if !ok {
						continue
					}
					_, port, _ := net.SplitHostPort(s.local)
					out = append(out, Connection{Region: r.Region, Process: part, Local: s.local, Remote: s.remote, Called: !listening[port]})
				}
			}
		}
	}
	slices.SortFunc(out, func(a, b Connection) int {
		return strings.Compare(a.Region+a.Local+a.Remote, b.Region+b.Local+b.Remote)
	})
	return out, nil
}

type tcpSocket struct{ local, remote string }

// tcpSockets returns the established connections by inode, and the local ports
// that are listened on.
func tcpSockets() (established map[string]tcpSocket, listening map[string]bool, err error) {
	established, listening = map[string]tcpSocket{}, map[string]bool{}
	for _, file := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		b, err := os.ReadFile(file)
		if os.IsNotExist(err) {
			continue // no IPv6
		}
		if err != nil {
			return nil, nil, err
		}
		for _, line := range strings.Split(string(b), "\n")[1:] {
			f := strings.Fields(line)
			if len(f) < 10 {
				continue
			}
			local, err := kernelAddress(f[1])
			if err != nil {
				return nil, nil, fmt.Errorf("%s: %w", file, err)
			}
			remote, err := kernelAddress(f[2])
			if err != nil {
				return nil, nil, fmt.Errorf("%s: %w", file, err)
			}
			const stateEstablished, stateListening = "01", "0A"
			switch f[3] {
			case stateEstablished:
				established[f[9]] = tcpSocket{local, remote}
			case stateListening:
				_, port, _ := net.SplitHostPort(local)
				listening[port] = true
			}
		}
	}
	return established, listening, nil
}

// kernelAddress reads an address as /proc/net/tcp has it: 32-bit words in the
// machine's order, little-endian on all that Quorate runs on, then the port.
func kernelAddress(s string) (string, error) {
	words, port, ok := strings.Cut(s, ":")
	ip, err := hex.DecodeString(words)
	n, portErr := strconv.ParseUint(port, 16, 16)
	if !ok || err != nil || portErr != nil || len(ip)%4 != 0 {
		return "", fmt.Errorf("%q is no address", s)
	}
	for i := 0; i < len(ip); i += 4 {
		slices.Reverse(ip[i : i+4])
	}
	return net.JoinHostPort(net.IP(ip).String(), strconv.FormatUint(n, 10)), nil
}

func socketInodes(pid int) ([]string, error) {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if os.IsNotExist(err) {
		return nil, nil // a backend that has ended meanwhile
	}
	if err != nil {
		return nil, err
	}
	var inodes []string
	for _, e := range entries {
		at, err := os.Readlink(filepath.Join(dir, e.Name()))
		if err != nil {
			continue // closed meanwhile
		}
		if inode, ok := strings.CutPrefix(at, "socket:["); ok {
			inodes = append(inodes, strings.TrimSuffix(inode, "]"))
		}
	}
	return inodes, nil
}
