package registry

import (
	"fmt"
	"strconv"
	"strings"

	"webgw.dev/webgw"
	"webgw.dev/webgw/internal/store"
)

const portPrefix = "port/"

// space is the ports of one gateway, of TCP or of UDP: "GATEWAY" or
// "GATEWAY/udp".
type space string

func portSpace(gateway webgw.ID, p webgw.ExposureProtocol) space {
	if p == webgw.UDP {
		return space(gateway.String() + "/udp")
	}
	return space(gateway.String())
}

// key is the index key of a range of ports: "port/GATEWAY/6000-6100/udp".
func (s space) key(r webgw.PortRange) string {
	gateway, udp, isUDP := strings.Cut(string(s), "/")
	key := portPrefix + gateway + "/" + r.String()
	if isUDP {
		key += "/" + udp
	}
	return key
}

// parsePortKey reads what key gives.
func parsePortKey(key string) (s space, r webgw.PortRange, ok bool) {
	part := strings.Split(key, "/")
	if len(part) < 3 || len(part) > 4 || part[0]+"/" != portPrefix {
		return "", r, false
	}
	s = space(part[1])
	if len(part) == 4 {
		s += space("/" + part[3])
	}
	r, err := webgw.ParsePortRange(part[2])
	return s, r, err == nil
}

// portBlock is how many ports one guard is for: a range of the greatest size
// touches five, and whoever takes ports a thousand away is not in the way.
const portBlock = 256

// guards are the names of the guards of a range. Whatever is decided about
// ports holds only as long as nobody takes one that overlaps: whoever takes one
// writes its guards.
func (s space) guards(r webgw.PortRange) (names []string) {
	for b := int(r.First) / portBlock; b <= int(r.Last)/portBlock; b++ {
		names = append(names, portPrefix+string(s)+"/"+strconv.Itoa(b))
	}
	return names
}

// portsOf counts the ports that a record takes on each of its gateways.
func portsOf(r *webgw.Record) int {
	if r.Exposure == nil {
		return 0
	}
	ports, ok := r.Exposure.Ports()
	if !ok {
		return 0
	}
	return ports.Len()
}

// takePorts judges ports against every range that overlaps them. They are one
// record's, even among those of one owner, unless all share them.
func (p *plan) takePorts(r *webgw.Record, c claim) error {
	s, ports, _ := parsePortKey(c.key)
	for _, g := range s.guards(ports) {
		p.on(prefixGuard+g, p.m.guards[g])
		p.ops[prefixGuard+g] = store.Op{Key: prefixGuard + g}
	}
	for key, held := range p.m.ports[s] {
		if !held.Overlaps(ports) {
			continue
		}
		uses, _ := p.live(key, p.m.holdings[key])
		for _, u := range uses {
			if u.Record == r.Key() || c.shared && u.Shared {
				continue
			}
			what := held.String()
			if !held.Contains(ports) {
				what = webgw.PortRange{First: max(held.First, ports.First), Last: min(held.Last, ports.Last)}.String()
			} else {
				what = ports.String()
			}
			return taken(c.field, "ask for a free port", "%s port %s is taken on gateway %s", transport(r.Exposure.Protocol), what, p.nameOf(r.Exposure.Gateways[c.port]))
		}
	}
	return nil
}

func transport(p webgw.ExposureProtocol) webgw.ExposureProtocol {
	if p == webgw.UDP {
		return p
	}
	return webgw.TCP
}

// linkPortsLocked makes the ports of an index key findable, unlinkPortsLocked
// forgets them.
func (m *mirror) linkPortsLocked(key string) {
	s, r, ok := parsePortKey(key)
	if !ok {
		return // nobody of this release has written it
	}
	if m.ports[s] == nil {
		m.ports[s] = map[string]webgw.PortRange{}
	}
	m.ports[s][key] = r
}

func (m *mirror) unlinkPortsLocked(key string) {
	s, _, _ := parsePortKey(key)
	delete(m.ports[s], key)
	if len(m.ports[s]) == 0 {
		delete(m.ports, s)
	}
}

// freePorts lists the ports that begin a run of count which all gateways offer
// and nobody holds.
func (p *plan) freePorts(ids []webgw.ID, offers []webgw.PortSet, protocol webgw.ExposureProtocol, count int) (first []uint16) {
	var offered [1 << 16]int // by how many
	for i, set := range offers {
		ranges, _ := set.Ranges() // validated with its record; a malformed set offers nothing
		for _, r := range ranges {
			for n := int(r.First); n <= int(r.Last); n++ {
				offered[n]++
			}
		}
		for key, r := range p.m.ports[portSpace(ids[i], protocol)] {
			if uses, _ := p.live(key, p.m.holdings[key]); len(uses) == 0 {
				continue
			}
			for n := int(r.First); n <= int(r.Last); n++ {
				offered[n] = -1 << 16
			}
		}
	}
	run := 0
	for n, by := range offered {
		if run++; by != len(ids) {
			run = 0
		}
		if run >= count {
			first = append(first, uint16(n-count+1))
		}
	}
	return first
}

// count reads how many ports are asked for; "" is one.
func portCount(s string) (int, error) {
	if s == "" {
		return 1, nil
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < 1 || n > webgw.MaxPorts {
		return 0, &webgw.Error{Kind: webgw.Invalid, Field: "count", Public: fmt.Sprintf("must be from 1 to %d", webgw.MaxPorts)}
	}
	return n, nil
}
