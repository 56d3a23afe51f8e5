-- The sizes of the quorums beside the durability that they give.
CREATE OR REPLACE VIEW quorate.status AS
    SELECT p.shard, s.region, s.role, s.leader, s.ballot, s.lease_left_seconds, s.chosen, s.applied,
           s.lag_slots, s.lag_seconds, s.health, s.synchronous, s.durability_regions, p.at AS published_at,
           s.phase1_quorum, s.phase2_quorum
      FROM quorate.published p, LATERAL jsonb_to_record(p.state) AS s(
           region text, role text, leader text, ballot text, lease_left_seconds double precision, chosen bigint,
           applied bigint, lag_slots bigint, lag_seconds double precision, health text, synchronous boolean, durability_regions integer,
           phase1_quorum integer, phase2_quorum integer);
