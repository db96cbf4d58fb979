// Package webgw is the vocabulary of the Web Gateway: identities, the records
// that owners declare, the addresses they name, their validation, and the one
// error type. The same types travel through the API, the store, the gateway,
// the node and the SDK.
//
// This package does no I/O, holds no keys and knows no transport: it must not
// import net/http, and it must not know that a store, a tunnel or a
// certificate exists.
package webgw

// Protocol is the version of everything that two processes of different
// releases say to each other: records, the tunnel and the registry API. A
// process speaks every version from MinProtocol to Protocol.
//
// History:
//
//	1  2026-11-22  first version: records farm, gateway, node, name, zone,
//	               network, exposure; tunnel webgw/1; registry API /v1
const Protocol = 1

// MinProtocol is the oldest version still understood.
const MinProtocol = 1

// Application protocol names (ALPN, RFC 7301) by which the gateway's TLS port
// tells its own traffic from visitors'.
const (
	// ALPNTunnel opens a session: mutual TLS, the control connection.
	ALPNTunnel = "webgw/1"
	// ALPNData opens a data connection of a session, admitted by a token.
	ALPNData = "webgw-data/1"
	// ALPNRegistry speaks the registry's HTTPS API (HTTP/1.1 inside).
	ALPNRegistry = "webgw-registry/1"
)
