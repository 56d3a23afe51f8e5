package sandbox

import (
	"errors"
	"slices"
	"sync"

	"quorate/deploy/sandbox/relay"
)

// network is all that lies between the regions. Safe for concurrent use.
type network struct {
	description *Description
	relays      []*relay.Relay

	mu    sync.Mutex
	wires map[[2]string]*relay.Wire // by the pair of regions, the earlier first
	// islands are the partitions in force: a pair is cut if one of them holds
	// one of the pair and not the other. Regions of one island, cut off in one
	// call, reach each other.
	islands [][]string
}

// newNetwork opens every relay of the description.
func newNetwork(d *Description) (*network, error) {
	n := &network{description: d, wires: map[[2]string]*relay.Wire{}}
	for a, from := range d.Regions {
		for b, to := range d.Regions[a+1:] {
			n.wires[[2]string{from.Name, to.Name}] = relay.NewWire(RoundTrip(d.WAN, a, a+1+b) / 2)
		}
	}
	for _, p := range purposes {
		for _, from := range d.Regions {
			for _, to := range d.Regions {
				if from == to {
					continue
				}
				r, err := relay.Listen(address(d.Relays[p.name][from.Name+">"+to.Name]), to.Address(p.name), n.wire(from.Name, to.Name))
				if err != nil {
					n.close()
					return nil, err
				}
				n.relays = append(n.relays, r)
			}
		}
	}
	return n, nil
}

func (n *network) close() {
	var closing sync.WaitGroup
	for _, r := range n.relays {
		closing.Go(r.Close)
	}
	closing.Wait()
}

func (n *network) wire(a, b string) *relay.Wire {
	if w, ok := n.wires[[2]string{a, b}]; ok {
		return w
	}
	return n.wires[[2]string{b, a}]
}

// partition cuts the regions off from all others, and returns when nothing
// passes between them any more.
func (n *network) partition(regions []string) error {
	if err := n.known(regions); err != nil {
		return err
	}
	if len(regions) == 0 {
		return errors.New("name the regions to cut off")
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.islands = append(n.islands, slices.Clone(regions))
	n.enforce()
	return nil
}

// heal takes the regions out of every partition, all of them if none is named.
func (n *network) heal(regions []string) error {
	if err := n.known(regions); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	var left [][]string
	if len(regions) > 0 {
		for _, island := range n.islands {
			island = slices.DeleteFunc(slices.Clone(island), func(r string) bool { return slices.Contains(regions, r) })
			if len(island) > 0 {
				left = append(left, island)
			}
		}
	}
	n.islands = left
	n.enforce()
	return nil
}

// enforce brings the wires in line with the islands; mu is held.
func (n *network) enforce() {
	for pair, w := range n.wires {
		cut := slices.ContainsFunc(n.islands, func(island []string) bool {
			return slices.Contains(island, pair[0]) != slices.Contains(island, pair[1])
		})
		if cut {
			w.Cut()
		} else {
			w.Mend()
		}
	}
}

// partitioned reports whether a region was cut off and not healed.
func (n *network) partitioned(region string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.ContainsFunc(n.islands, func(island []string) bool { return slices.Contains(island, region) })
}

func (n *network) known(regions []string) error {
	for _, r := range regions {
		if _, err := n.description.Region(r); err != nil {
			return err
		}
	}
	return nil
}
