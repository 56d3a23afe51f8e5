package paxosgroup

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
)

// EncodeBase returns b in a form that DecodeBase reads back: what an image of
// the database carries, so that its loader's log can start there.
//
//	0  1  version: 1, or 2 if there are sessions
//	1  8  slot            little-endian, as all numbers
//	9  8  term counter
//	17 4  term replica
//	21 8  incarnation
//	29 8  next number
//	37 2  length of region, then region
//	   …  version 2: number of sessions (1), 1 to SessionsMax; each: id (8), sequence (8)
//	   …  membership as EncodeMembership
func EncodeBase(b Base) []byte {
	out := []byte{1}
	if len(b.Judge.Sessions) > 0 {
		out[0] = 2
	}
	out = binary.LittleEndian.AppendUint64(out, uint64(b.Slot))
	out = binary.LittleEndian.AppendUint64(out, b.Judge.Term.Counter)
	out = binary.LittleEndian.AppendUint32(out, uint32(b.Judge.Term.Replica))
	out = binary.LittleEndian.AppendUint64(out, uint64(b.Judge.Incarnation))
	out = binary.LittleEndian.AppendUint64(out, b.Judge.Next)
	out = binary.LittleEndian.AppendUint16(out, uint16(len(b.Judge.Region)))
	out = append(out, b.Judge.Region...)
	if len(b.Judge.Sessions) > 0 {
		out = append(out, byte(len(b.Judge.Sessions)))
		for _, s := range b.Judge.Sessions {
			out = binary.LittleEndian.AppendUint64(out, s.ID)
			out = binary.LittleEndian.AppendUint64(out, s.Sequence)
		}
	}
	return append(out, EncodeMembership(b.Membership)...)
}

// DecodeBase reads what EncodeBase wrote.
func DecodeBase(in []byte) (Base, error) {
	const head = 39
	if len(in) < head {
		return Base{}, errors.New("base: cut short")
	}
	if in[0] != 1 && in[0] != 2 {
		return Base{}, fmt.Errorf("base: version %d is not known", in[0])
	}
	b := Base{
		Slot: Slot(binary.LittleEndian.Uint64(in[1:])),
		Judge: Judge{
			Term:        Ballot{Counter: binary.LittleEndian.Uint64(in[9:]), Replica: ReplicaID(binary.LittleEndian.Uint32(in[17:]))},
			Incarnation: Incarnation(binary.LittleEndian.Uint64(in[21:])),
			Next:        binary.LittleEndian.Uint64(in[29:]),
		},
	}
	region := int(binary.LittleEndian.Uint16(in[37:]))
	if len(in) < head+region {
		return Base{}, errors.New("base: cut short")
	}
	b.Judge.Region = string(in[head : head+region])
	rest := in[head+region:]
	if in[0] == 2 {
		if len(rest) == 0 || rest[0] == 0 || rest[0] > SessionsMax || len(rest) < 1+16*int(rest[0]) {
			return Base{}, errors.New("base: sessions cut short, or more or fewer than there can be")
		}
		sessions := make([]Session, rest[0])
		for i := range sessions {
			at := rest[1+16*i:]
			sessions[i] = Session{ID: binary.LittleEndian.Uint64(at), Sequence: binary.LittleEndian.Uint64(at[8:])}
			if sessions[i].ID == 0 || slices.ContainsFunc(sessions[:i], func(s Session) bool { return s.ID == sessions[i].ID }) {
				return Base{}, errors.New("base: a session without id, or twice")
			}
		}
		b.Judge.Sessions, rest = sessions, rest[1+16*len(sessions):]
	}
	m, err := DecodeMembership(rest)
	if err != nil {
		return Base{}, fmt.Errorf("base: %w", err)
	}
	b.Membership = m
	return b, nil
}
