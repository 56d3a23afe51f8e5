package sandbox

import (
	"fmt"
	"time"
)

// RegionsMax is how many regions a sandbox can have: as many as places has.
const RegionsMax = 7

// The delays between regions.
const (
	WANNone   = "none"   // no delay
	WANGlobal = "global" // the round trips of places
)

// places are where the regions of WANGlobal lie, r1 first.
var places = [RegionsMax]string{"Frankfurt", "London", "Stockholm", "Tel Aviv", "New York", "Mumbai", "Singapore"}

// roundTripMillis are usual round trips between the places over the public
// networks of large providers, rounded; from Frankfurt to the first four others
// 12, 25, 60 and 80 ms. Row and column as in places, upper half.
var roundTripMillis = [RegionsMax][RegionsMax]int{
	//          Lon  Sto  Tel  New  Mum  Sin
	{0 /*Fra*/, 12, 25, 60, 80, 115, 155},
	{0, 0 /*Lon*/, 30, 62, 70, 120, 165},
	{0, 0, 0 /*Sto*/, 75, 100, 130, 170},
	{0, 0, 0, 0 /*Tel*/, 130, 125, 180},
	{0, 0, 0, 0, 0 /*New*/, 190, 225},
	{0, 0, 0, 0, 0, 0 /*Mum*/, 60},
}

// RoundTrip returns the round trip between the a-th and the b-th region,
// counted from 0.
func RoundTrip(wan string, a, b int) time.Duration {
	if wan != WANGlobal {
		return 0
	}
	return time.Duration(roundTripMillis[min(a, b)][max(a, b)]) * time.Millisecond
}

// Place returns where the i-th region lies, empty without delays.
func Place(wan string, i int) string {
	if wan != WANGlobal {
		return ""
	}
	return places[i]
}

func checkWAN(wan string) error {
	if wan != WANNone && wan != WANGlobal {
		return fmt.Errorf("wan %q: must be %s or %s", wan, WANNone, WANGlobal)
	}
	return nil
}
