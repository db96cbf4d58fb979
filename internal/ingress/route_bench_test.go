package ingress

import (
	"fmt"
	"strings"
	"testing"

	"webgw.dev/webgw"
)

// BenchmarkLookup finds a name among a million: one of the thousand that are
// asked for most, whose entries are in the processor's caches, or any.
func BenchmarkLookup(b *testing.B) {
	const names = 1_000_000
	all := make([]Declared, names)
	hosts := make([]string, names)
	for i := range all {
		hosts[i] = fmt.Sprintf("service-%d.gent.example", i)
		all[i] = expose(fmt.Sprint("e", i), webgw.HTTP, hosts[i:i+1], "localhost:1")
	}
	t, problems := Build(all)
	if len(problems) > 0 {
		b.Fatal(problems[0])
	}
	for _, popular := range []int{1_000, names} {
		// Names as they come from visitors: in memory of their own, just written.
		asked := make([]string, popular)
		for i := range asked {
			asked[i] = strings.Clone(hosts[(i*7919+1)%names])
		}
		b.Run(fmt.Sprintf("popular=%d", popular), func(b *testing.B) {
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				if t.HTTP(asked[i%popular]) == nil {
					b.Fatal("not found")
				}
			}
		})
	}
}
