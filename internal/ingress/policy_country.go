package ingress

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"sync/atomic"
	"time"

	"github.com/oschwald/maxminddb-golang/v2"
)

const (
	countriesLook = 10 * time.Second // how often a database is looked at for a change
	maxCountries  = 1 << 30          // bytes of a database
)

// NoCountries is the code of the problem that an exposure by countries has on a
// gateway that can't tell them.
const NoCountries = "no_country_database"

// Countries tells the country of addresses by a database in MaxMind's format
// (https://maxmind.github.io/MaxMind-DB/), read again when it changes.
type Countries struct {
	path string
	log  *slog.Logger
	seen string // stamp of the file
	db   atomic.Pointer[maxminddb.Reader]
}

// OpenCountries reads the database.
func OpenCountries(path string, log *slog.Logger) (*Countries, error) {
	c := &Countries{path: path, log: log}
	c.seen = c.stamp()
	return c, c.load()
}

// load reads the file into memory: a mapped one that is cut short would end the
// process.
func (c *Countries) load() error {
	info, err := os.Stat(c.path)
	if err != nil {
		return err
	}
	if info.Size() > maxCountries {
		return fmt.Errorf("%s is larger than %d bytes", c.path, maxCountries)
	}
	b, err := os.ReadFile(c.path)
	if err != nil {
		return err
	}
	db, err := maxminddb.OpenBytes(b)
	if err == nil {
		err = db.Verify()
	}
	if err != nil {
		return fmt.Errorf("%s is no country database: %w", c.path, err)
	}
	c.db.Store(db)
	return nil
}

func (c *Countries) stamp() string {
	info, err := os.Stat(c.path)
	if err != nil {
		return ""
	}
	return fmt.Sprint(info.ModTime().UnixNano(), info.Size())
}

// Watch reads the file again when it changes, until ctx ends. What is no
// database leaves the one before in force.
func (c *Countries) Watch(ctx context.Context) error {
	tick := time.NewTicker(countriesLook)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		now := c.stamp()
		if now == c.seen {
			continue
		}
		if err := c.load(); err != nil {
			c.log.Warn("country database stays as it was", "err", err)
			continue
		}
		c.seen = now
		c.log.Info("country database reloaded")
	}
}

// Of returns the country of an address by its code (ISO 3166-1), "" if the
// database has none for it.
func (c *Countries) Of(a netip.Addr) (code string, err error) {
	r := c.db.Load().Lookup(a)
	if err := r.Err(); err != nil || !r.Found() {
		return "", err
	}
	if err := r.DecodePath(&code, "country", "iso_code"); err != nil {
		return "", err
	}
	if code == "" { // as some makers have it
		err = r.DecodePath(&code, "country_code")
	}
	return code, err
}

// lets says why the address may not come, "" if it may. An address whose
// country can't be told is let in by address only.
func (g *guard) lets(a netip.Addr) (reason string) {
	p := g.policy
	if g.deny.contains(a) {
		return reasonDenied
	}
	if len(p.AllowCountries)+len(p.DenyCountries) == 0 {
		if g.allow == nil || g.allow.contains(a) {
			return ""
		}
		return reasonDenied
	}
	if g.countries == nil {
		return reasonNoCountry
	}
	from, err := g.countries.Of(a)
	switch {
	case err != nil:
		return reasonNoCountry
	case from != "" && slices.Contains(p.DenyCountries, from):
		return reasonCountry
	case g.allow.contains(a), from != "" && slices.Contains(p.AllowCountries, from), g.allow == nil && len(p.AllowCountries) == 0:
		return ""
	}
	return reasonCountry
}
