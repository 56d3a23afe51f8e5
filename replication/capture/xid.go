package capture

// xidExtender turns the 32-bit transaction ids of the wire into full ones. All
// ids that a server can still deliver lie within 2^31 of its newest one.
type xidExtender struct {
	newest uint64
}

func (x *xidExtender) extend(xid uint32) uint64 {
	full := uint64(int64(x.newest) + int64(int32(xid-uint32(x.newest))))
	x.newest = max(x.newest, full)
	return full
}
