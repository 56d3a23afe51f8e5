package paxosgroup

import (
	"fmt"
	"math/bits"
	"math/rand/v2"
	"reflect"
	"sync"
	"time"
	"unsafe"
)

// A plan copies and hashes values of one type, deeply. It is made from the type,
// so that a field added to Replica is covered without a word here: what cannot
// be covered (a channel, a function, an unknown interface) stops the test.
//
// Time stands still while the explorer looks: everything happens at present. Of
// two instants it tells apart what is near enough to be a count of events (stamps
// of one moment are told apart by nanoseconds), else only past and future.
type plan struct {
	copy func(dst, src unsafe.Pointer) // dst holds a shallow copy already
	hash func(h uint64, p unsafe.Pointer) uint64
	flat bool // a shallow copy is a copy
	bits bool // and its bytes are all there is to it
}

var (
	plansMu sync.Mutex
	plans   = map[reflect.Type]*plan{}

	instantType  = reflect.TypeFor[Instant]()
	durationType = reflect.TypeFor[time.Duration]()
	untouched    = map[reflect.Type]bool{ // neither state nor deep
		reflect.TypeFor[Config](): true, reflect.TypeFor[Storage](): true, reflect.TypeFor[*rand.Rand](): true,
	}
)

func mix(h, v uint64) uint64 {
	hi, lo := bits.Mul64(h^v^0x9e3779b97f4a7c15, 0xd6e8feb86659fd93)
	return hi ^ lo ^ bits.RotateLeft64(h, 23)
}

func mixBytes(h uint64, b []byte) uint64 {
	h = mix(h, uint64(len(b)))
	for len(b) >= 8 {
		h = mix(h, *(*uint64)(unsafe.Pointer(&b[0])))
		b = b[8:]
	}
	for _, c := range b {
		h = mix(h, uint64(c))
	}
	return h
}

func planOf[T any]() *plan { return planFor(reflect.TypeFor[T]()) }

func deepCopy[T any](p *T) *T {
	out := *p
	if f := planOf[T](); !f.flat {
		f.copy(unsafe.Pointer(&out), unsafe.Pointer(p))
	}
	return &out
}

func deepHash[T any](h uint64, p *T) uint64 { return planOf[T]().hash(h, unsafe.Pointer(p)) }

func planFor(t reflect.Type) *plan {
	plansMu.Lock()
	defer plansMu.Unlock()
	return makePlan(t)
}

// makePlan is called with plansMu held.
func makePlan(t reflect.Type) *plan {
	if p := plans[t]; p != nil {
		return p
	}
	p := &plan{}
	plans[t] = p // before its parts: a type may hold itself
	switch {
	case untouched[t]:
		p.flat = true
		p.hash = func(h uint64, _ unsafe.Pointer) uint64 { return h }
	case t == instantType:
		p.flat = true
		p.hash = func(h uint64, q unsafe.Pointer) uint64 {
			v := *(*Instant)(q)
			switch d := v - present; {
			case v == 0:
				return mix(h, 0)
			case d > 1000:
				return mix(h, 1)
			case d < -1000:
				return mix(h, 2)
			default:
				return mix(h, uint64(d+2000))
			}
		}
	case t == durationType:
		p.flat = true
		p.hash = func(h uint64, _ unsafe.Pointer) uint64 { return h }
	default:
		makeKindPlan(p, t)
	}
	return p
}

func makeKindPlan(p *plan, t reflect.Type) {
	switch t.Kind() {
	case reflect.Bool, reflect.Int8, reflect.Uint8:
		p.flat, p.bits = true, true
		p.hash = func(h uint64, q unsafe.Pointer) uint64 { return mix(h, uint64(*(*uint8)(q))) }
	case reflect.Int16, reflect.Uint16:
		p.flat, p.bits = true, true
		p.hash = func(h uint64, q unsafe.Pointer) uint64 { return mix(h, uint64(*(*uint16)(q))) }
	case reflect.Int32, reflect.Uint32, reflect.Float32:
		p.flat, p.bits = true, true
		p.hash = func(h uint64, q unsafe.Pointer) uint64 { return mix(h, uint64(*(*uint32)(q))) }
	case reflect.Int, reflect.Uint, reflect.Int64, reflect.Uint64, reflect.Float64:
		p.flat, p.bits = true, true
		p.hash = func(h uint64, q unsafe.Pointer) uint64 { return mix(h, *(*uint64)(q)) }
	case reflect.String:
		p.flat = true
		p.hash = func(h uint64, q unsafe.Pointer) uint64 {
			s := *(*string)(q)
			return mixBytes(h, unsafe.Slice(unsafe.StringData(s), len(s)))
		}
	case reflect.Pointer:
		makePointerPlan(p, t)
	case reflect.Struct:
		makeStructPlan(p, t)
	case reflect.Array:
		makeArrayPlan(p, t)
	case reflect.Slice:
		makeSlicePlan(p, t)
	case reflect.Map:
		makeMapPlan(p, t)
	default:
		panic(fmt.Sprintf("the explorer cannot copy a %v: teach it, or keep it out of the core", t))
	}
}

func makePointerPlan(p *plan, t reflect.Type) {
	elem := makePlan(t.Elem())
	p.copy = func(dst, src unsafe.Pointer) {
		from := *(*unsafe.Pointer)(src)
		if from == nil {
			return
		}
		to := reflect.New(t.Elem())
		to.Elem().Set(reflect.NewAt(t.Elem(), from).Elem())
		if !elem.flat {
			elem.copy(to.UnsafePointer(), from)
		}
		*(*unsafe.Pointer)(dst) = to.UnsafePointer()
	}
	p.hash = func(h uint64, q unsafe.Pointer) uint64 {
		if q = *(*unsafe.Pointer)(q); q == nil {
			return mix(h, 0)
		}
		return elem.hash(mix(h, 1), q)
	}
}

func makeStructPlan(p *plan, t reflect.Type) {
	type part struct {
		offset uintptr
		plan   *plan
	}
	var deep, all []part
	for i := range t.NumField() {
		f := t.Field(i)
		q := part{f.Offset, makePlan(f.Type)}
		all = append(all, q)
		if !q.plan.flat {
			deep = append(deep, q)
		}
	}
	p.flat = len(deep) == 0
	p.copy = func(dst, src unsafe.Pointer) {
		for _, d := range deep {
			d.plan.copy(unsafe.Add(dst, d.offset), unsafe.Add(src, d.offset))
		}
	}
	p.hash = func(h uint64, q unsafe.Pointer) uint64 {
		for _, a := range all {
			h = a.plan.hash(h, unsafe.Add(q, a.offset))
		}
		return h
	}
}

func makeArrayPlan(p *plan, t reflect.Type) {
	elem, n, size := makePlan(t.Elem()), t.Len(), t.Elem().Size()
	p.flat = elem.flat
	p.copy = func(dst, src unsafe.Pointer) {
		for i := range n {
			elem.copy(unsafe.Add(dst, uintptr(i)*size), unsafe.Add(src, uintptr(i)*size))
		}
	}
	p.bits = elem.bits
	p.hash = func(h uint64, q unsafe.Pointer) uint64 {
		if elem.bits {
			return mixBytes(h, unsafe.Slice((*byte)(q), uintptr(n)*size))
		}
		for i := range n {
			h = elem.hash(h, unsafe.Add(q, uintptr(i)*size))
		}
		return h
	}
}

// makeSlicePlan shares bytes, which are payloads and never changed, and tells
// no empty slice from none.
func makeSlicePlan(p *plan, t reflect.Type) {
	if t.Elem().Kind() == reflect.Uint8 {
		p.flat = true
		p.hash = func(h uint64, q unsafe.Pointer) uint64 { return mixBytes(h, *(*[]byte)(q)) }
		return
	}
	elem, size := makePlan(t.Elem()), t.Elem().Size()
	type header struct {
		data     unsafe.Pointer
		len, cap int
	}
	p.copy = func(dst, src unsafe.Pointer) {
		from := (*header)(src)
		if from.len == 0 {
			*(*header)(dst) = header{}
			return
		}
		fresh := reflect.MakeSlice(t, from.len, from.len)
		reflect.Copy(fresh, reflect.NewAt(t, src).Elem())
		data := fresh.UnsafePointer()
		if !elem.flat {
			for i := range from.len {
				elem.copy(unsafe.Add(data, uintptr(i)*size), unsafe.Add(from.data, uintptr(i)*size))
			}
		}
		to := (*header)(dst)
		to.data, to.len, to.cap = data, from.len, from.len
	}
	p.hash = func(h uint64, q unsafe.Pointer) uint64 {
		s := (*header)(q)
		h = mix(h, uint64(s.len))
		if elem.bits && s.len > 0 {
			return mixBytes(h, unsafe.Slice((*byte)(s.data), uintptr(s.len)*size))
		}
		for i := range s.len {
			h = elem.hash(h, unsafe.Add(s.data, uintptr(i)*size))
		}
		return h
	}
}

func makeMapPlan(p *plan, t reflect.Type) {
	key, elem := makePlan(t.Key()), makePlan(t.Elem())
	if !key.flat {
		panic(fmt.Sprintf("the explorer cannot copy the keys of a %v", t))
	}
	// A map hands out neither addresses nor an order: each pair is copied out, and
	// their hashes are added up.
	each := func(q unsafe.Pointer, do func(k, v reflect.Value)) {
		m := reflect.NewAt(t, q).Elem()
		if m.Len() == 0 {
			return
		}
		k, v := reflect.New(t.Key()).Elem(), reflect.New(t.Elem()).Elem()
		for i := m.MapRange(); i.Next(); {
			k.SetIterKey(i)
			v.SetIterValue(i)
			do(k, v)
		}
	}
	p.copy = func(dst, src unsafe.Pointer) {
		if reflect.NewAt(t, src).Elem().IsNil() {
			return
		}
		fresh := reflect.MakeMap(t)
		each(src, func(k, v reflect.Value) {
			if !elem.flat {
				c := reflect.New(t.Elem()).Elem()
				c.Set(v)
				elem.copy(c.Addr().UnsafePointer(), v.Addr().UnsafePointer())
				v = c
			}
			fresh.SetMapIndex(k, v)
		})
		reflect.NewAt(t, dst).Elem().Set(fresh)
	}
	p.hash = func(h uint64, q unsafe.Pointer) uint64 {
		var sum uint64
		each(q, func(k, v reflect.Value) {
			sum += elem.hash(key.hash(0, k.Addr().UnsafePointer()), v.Addr().UnsafePointer())
		})
		return mix(h, sum)
	}
}
