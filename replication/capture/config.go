package capture

import (
	"errors"
	"fmt"
	"log/slog"
	"regexp"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
)

// Config says where to capture from. Zero values of the optional settings take
// the defaults.
type Config struct {
	ConnString      string // URL or key/value pairs of the local server and the replicated database; its user needs REPLICATION
	ApplicationName string // the name that synchronous_standby_names lists; default "quorate"
	ReplicationSlot string
	Publication     string
	Handler         Handler
	Logger          *slog.Logger // default slog.Default()

	// Authentic tells the DDL messages of the database's event trigger from those
	// that a user sent, which are dropped. Nil takes all for authentic.
	Authentic func(content []byte) bool

	FragmentBytesMax int           // a larger transaction goes in fragments of at most this size; default 1 MiB
	StatusInterval   time.Duration // how often the last confirmation is repeated as a sign of life; default 1 s
	ReceiveTimeout   time.Duration // silence of the server, though asked to answer, that ends the stream; default 60 s
}

const (
	fragmentBytesMaxDefault = 1 << 20
	fragmentBytesMaxLimit   = 32 << 20
	statusIntervalDefault   = time.Second
	receiveTimeoutDefault   = time.Minute
	connectTimeout          = 10 * time.Second
	closeTimeout            = 2 * time.Second
)

var replicationSlotName = regexp.MustCompile(`^[a-z0-9_]{1,63}$`)

// complete fills defaults in and returns all the faults at once.
func (c *Config) complete() error {
	if c.ApplicationName == "" {
		c.ApplicationName = "quorate"
	}
	if c.Logger == nil {
		c.Logger = slog.Default()
	}
	if c.FragmentBytesMax == 0 {
		c.FragmentBytesMax = fragmentBytesMaxDefault
	}
	if c.StatusInterval == 0 {
		c.StatusInterval = statusIntervalDefault
	}
	if c.ReceiveTimeout == 0 {
		c.ReceiveTimeout = receiveTimeoutDefault
	}
	var errs []error
	if !replicationSlotName.MatchString(c.ReplicationSlot) {
		errs = append(errs, fmt.Errorf("setting ReplicationSlot is %q: a name has 1 to 63 lower-case letters, digits and underscores", c.ReplicationSlot))
	}
	if c.Publication == "" {
		errs = append(errs, errors.New("setting Publication is missing"))
	}
	if c.Handler == nil {
		errs = append(errs, errors.New("setting Handler is missing"))
	}
	if c.FragmentBytesMax < 1 || c.FragmentBytesMax > fragmentBytesMaxLimit {
		errs = append(errs, fmt.Errorf("setting FragmentBytesMax is %d, not in 1 to %d", c.FragmentBytesMax, fragmentBytesMaxLimit))
	}
	if c.StatusInterval < 0 || c.ReceiveTimeout < 0 {
		errs = append(errs, errors.New("settings StatusInterval and ReceiveTimeout must be above zero"))
	}
	return errors.Join(errs...)
}

// connConfig is the configuration of the replication connection. The settings
// decide how values are written as text; with them fixed, the same commit gives
// the same bytes in every session, and every region reads them alike.
func (c *Config) connConfig() (*pgconn.Config, error) {
	cc, err := pgconn.ParseConfig(c.ConnString)
	if err != nil {
		return nil, fmt.Errorf("parse connection string: %w", err)
	}
	if cc.ConnectTimeout == 0 {
		cc.ConnectTimeout = connectTimeout
	}
	for name, value := range map[string]string{
		"replication":                         "database",
		"application_name":                    c.ApplicationName,
		"client_encoding":                     "UTF8",
		"datestyle":                           "ISO, MDY",
		"intervalstyle":                       "postgres",
		"timezone":                            "UTC",
		"extra_float_digits":                  "3",
		"bytea_output":                        "hex",
		"lc_monetary":                         "C",
		"search_path":                         "pg_catalog",
		"statement_timeout":                   "0",
		"idle_in_transaction_session_timeout": "0",
	} {
		cc.RuntimeParams[name] = value
	}
	return cc, nil
}
