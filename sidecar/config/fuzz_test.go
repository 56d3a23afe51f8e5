package config

import (
	"reflect"
	"testing"

	"go.yaml.in/yaml/v3"
)

// FuzzParse: a file is refused, or says the same when it is written anew.
func FuzzParse(f *testing.F) {
	f.Add(minimal)
	f.Add("regions: &a [*a]\npostgres: &b {dsn: *b}\n<<: *b\n")
	f.Add("cluster: ~\nregion: [\n")
	f.Fuzz(func(t *testing.T, text string) {
		c, err := Parse("f", []byte(text))
		if err != nil {
			return
		}
		again, err := yaml.Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		if back, err := Parse("g", again); err != nil || !reflect.DeepEqual(back, c) {
			t.Fatalf("got %+v, %v; want %+v", back, err, c)
		}
	})
}
