package webgw

import (
	"net"
	"strconv"
	"strings"
)

// MaxPorts is how many ports one exposure may take.
const MaxPorts = 1000

// String gives "6000" or "6000-6100".
func (r PortRange) String() string {
	if r.First == r.Last {
		return strconv.Itoa(int(r.First))
	}
	return strconv.Itoa(int(r.First)) + "-" + strconv.Itoa(int(r.Last))
}

// Len is how many ports it is.
func (r PortRange) Len() int { return int(r.Last) - int(r.First) + 1 }

// Contains reports whether all of o lies in r.
func (r PortRange) Contains(o PortRange) bool { return r.First <= o.First && o.Last <= r.Last }

// Overlaps reports whether a port lies in both.
func (r PortRange) Overlaps(o PortRange) bool { return r.First <= o.Last && o.First <= r.Last }

// ParsePortRange reads "6000" or "6000-6100".
func ParsePortRange(s string) (PortRange, error) {
	ranges, err := PortSet(s).Ranges()
	if err != nil || len(ranges) != 1 {
		return PortRange{}, invalid("", "%q is not a port or a range such as 6000-6100", clip(s, 40))
	}
	return ranges[0], nil
}

// Covers reports whether all of r is in the set; a malformed set holds none.
func (s PortSet) Covers(r PortRange) bool {
	ranges, _ := s.Ranges()
	next := int(r.First) // ranges may follow one another without a gap
	for _, o := range ranges {
		if int(o.First) <= next && next <= int(o.Last) {
			next = int(o.Last) + 1
		}
	}
	return next > int(r.Last)
}

// Ports returns the public ports that the exposure takes; false if it is found
// on the gateway's own.
func (e *Exposure) Ports() (PortRange, bool) {
	return PortRange{e.Port, max(e.Port, e.PortEnd)}, e.Port != 0
}

// SharesPort reports whether others may be behind the exposure's port: those
// that are told apart by the server name.
func (e *Exposure) SharesPort() bool { return e.Protocol == TLS }

func (e *Exposure) validatePorts() error {
	switch {
	case e.Protocol == HTTP && e.Port != 0:
		return invalid("port", "belongs to protocols tcp, udp and tls; http is found by its host name")
	case e.PortEnd == 0:
		return nil
	case !e.Protocol.ByPort():
		return invalid("portEnd", "belongs to protocols tcp and udp only")
	case e.PortEnd <= e.Port:
		return invalid("portEnd", "must be above port")
	}
	r, _ := e.Ports()
	if r.Len() > MaxPorts {
		return invalid("portEnd", "%s are more than %d ports", r, MaxPorts)
	}
	for i, t := range e.Targets {
		if strings.HasPrefix(t.Address, "unix:") {
			return invalid(index("targets", i)+".address", "a socket of the file system has no port; a range needs as many as it has itself")
		}
		if _, port := t.hostPort(); int(port)+r.Len()-1 > 65535 {
			return invalid(index("targets", i), "%s: port %d and the %d that follow end above 65535", t, port, r.Len()-1)
		}
	}
	return nil
}

func (t Target) hostPort() (host string, port uint16) {
	at := t.Address
	if t.Direct != "" {
		at = t.Direct
	}
	host, port, _ = SplitHostPort(at) // validated, or a socket's path
	return host, port
}

// At returns where the port that is n above an exposure's first leads: n ports
// above the target's own.
func (t Target) At(n uint16) Target {
	if n == 0 {
		return t
	}
	host, port := t.hostPort()
	at := net.JoinHostPort(host, strconv.Itoa(int(port+n)))
	if t.Direct != "" {
		t.Direct = at
	} else {
		t.Address = at
	}
	return t
}

// Reaches reports whether a visitor of any of the exposure's ports may be led
// to the target.
func (e *Exposure) Reaches(want Target) bool {
	ports, _ := e.Ports()
	if ports.Len() == 1 {
		return e.LeadsTo(func(t Target) bool { return t == want })
	}
	_, to := want.hostPort()
	return e.LeadsTo(func(t Target) bool {
		_, from := t.hostPort()
		return from <= to && int(to-from) < ports.Len() && t.At(to-from) == want
	})
}
