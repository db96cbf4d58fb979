package webgw

// ProxyProtocol is a version of the PROXY protocol, by which a workload learns
// whose connection it has got.
type ProxyProtocol string

// The versions (https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt).
const (
	ProxyV1 ProxyProtocol = "v1" // a line of text
	ProxyV2 ProxyProtocol = "v2" // binary; for protocol tls with the server name and the visitor's first ALPN protocol
)

// validateHandling checks what is said beyond where the exposure leads.
func (e *Exposure) validateHandling() error {
	switch e.ProxyProtocol {
	case "":
	case ProxyV1, ProxyV2:
		if e.Protocol != TCP && e.Protocol != TLS {
			return invalid("proxyProtocol", "belongs to protocols tcp and tls; http tells the visitor's address in Forwarded")
		}
	default:
		return invalid("proxyProtocol", "%q is not known; v1 and v2 are", clip(string(e.ProxyProtocol), 20))
	}
	return nil
}
