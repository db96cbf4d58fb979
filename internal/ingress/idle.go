package ingress

import "webgw.dev/webgw"

// DropIdle closes the kept HTTP connections to a node's targets. Call it when
// the node's session has ended or was replaced: what was opened through the old
// one may lead nowhere, or to another process. Requests under way carry on.
func (s *Server) DropIdle(node webgw.ID) {
	t := s.table.Load()
	if t == nil {
		return
	}
	for _, r := range t.routes {
		for _, target := range r.targets {
			if target.Node == node {
				target.closeIdle()
			}
		}
	}
}
