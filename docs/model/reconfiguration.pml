/* reconfiguration.pml: wedge, recovery hand-over and activation (docs/protocol.md section 6, with sections 2, 3 and 5).
 *
 * Record 0 is ACTIVE, records 1 and 2 come later: rivals on one base, or one after the other. Each has three places; a record
 * may replace the incarnation in one of them. As in ordering.pml a correct member may act on anything that exists.
 *
 * Settings:  SLOTS, VIEWS (1: no view change within a configuration), ROTATE (proposers by slot, else the leader),
 *            ONE_SUCCESSOR (record 2 never comes).
 * Switches:  each leaves one rule out, and then pan must find a violation. They stand where the rule is applied.
 */
#define N 3
#define F 1
#define QC 2
#define RECORDS 3
#ifndef VIEWS
#define VIEWS 1
#endif
#ifndef SLOTS
#define SLOTS 1
#endif

/* Proposals for one (record, view, slot): the second one exists only where a rule is missing. */
#define KINDS 2
#define FIRST 0
#define SECOND 1
#define NOTHING 0
#define NOOP 1
#define VALUE(c, g, k) (2 + 4 * (c) + 2 * (g) + (k))  /* every batch is another value */
#define BOGUS 15

#define HAS(set, m) (((set) >> (m)) & 1)
#define ONLY(m) (1 << (m))
#define ALL (ONLY(N) - 1)
#define SIZE(set) (HAS(set, 0) + HAS(set, 1) + HAS(set, 2))

typedef Record {
  bit prepared;
  bit is_active;
  byte base;
  bit cleansed;         /* replaces the faulty incarnation; to replace a correct one changes nothing that is modelled */
  byte pinned[SLOTS];   /* the state of ACTIVE: every slot so far */
  byte length;          /* slots in it */
  /* the streams of its epoch, as sets of places */
  byte changed;         /* sent VIEW-CHANGE(1) */
  byte wedged;          /* sent VIEW-CHANGE(c', 0) */
  byte stopped;         /* closed by the controller, the log handed over */
  byte ended;           /* EPOCH-END: the wormhole certifies nothing more */
  byte entered;         /* view 1, by NEW-VIEW or COMMIT(NEW-VIEW) */
  byte S[SLOTS];        /* of NEW-VIEW(1) */
  byte s_max;
  bit new_view
};
typedef Log { byte best[SLOTS] };   /* what a wedge or a stopped replica leaves: 16 * view + value */
Record record[RECORDS];
Log log[RECORDS * N];
byte votes[RECORDS * VIEWS * SLOTS * KINDS];
byte decided[SLOTS];
byte decided_in[SLOTS];             /* record */
byte newest;                         /* the ACTIVE record */
byte faulty;                        /* the place whose first incarnation is faulty */
byte late;                          /* wedges of epoch 0 that name record 2 */

#define VOTES(c, g, s, k) votes[(((c) * VIEWS + (g)) * SLOTS + (s)) * KINDS + (k)]
#define VOTED(c, g, s, m) HAS(VOTES(c, g, s, FIRST) | VOTES(c, g, s, SECOND), m)
#define LOG(c, m, s) log[(c) * N + (m)].best[s]
#define CLEANSED(c) (record[c].cleansed || (c) == 2 && record[2].base == 1 && record[1].cleansed)
#define FAULTY(c, m) ((m) == faulty && !CLEANSED(c))
#ifdef ROTATE
#define PROPOSER(g, s) (((g) + (s)) % N)
#else
#define PROPOSER(g, s) ((g) % N)
#endif
/* Two records can share a base; a later one makes a wedge of its base due. */
#define SUCCESSOR(c) ((c) == 0 && record[1].prepared || record[2].prepared && record[2].base == (c))
#define ENTERED(c, m) HAS(record[c].entered, m)
#define CHANGED(c, m) HAS(record[c].changed, m)

/* ---- who may still speak in an epoch -------------------------------------------------------------------------------- */
#if defined(OLD_CONFIGURATION_RESUMES)
#define OPEN(c, m) (!HAS(record[c].stopped, m))
#elif defined(VOTES_AFTER_WEDGE)
#define OPEN(c, m) (!HAS(record[c].stopped, m) && (!HAS(record[c].wedged, m) || FAULTY(c, m)))
#elif defined(LOG_COPIED)
#define OPEN(c, m) (!HAS(record[c].wedged, m))
#else
#define OPEN(c, m) (!HAS(record[c].wedged | record[c].stopped, m))
#endif
#define IN_VIEW(c, g, m) (record[c].is_active && OPEN(c, m) && (g) == ENTERED(c, m) && CHANGED(c, m) <= (g))

hidden byte i, j, k, x, top, length;
hidden byte S[SLOTS];

inline say(value) {
  if
  :: value == NOTHING -> printf("nothing")
  :: value == NOOP -> printf("no-op")
  :: value == BOGUS -> printf("bogus")
  :: else -> printf("%c%d.%d", (value % 2 == 0 -> 'x' : 'y'), (value - 2) / 4, ((value - 2) / 2) % 2)
  fi
}

inline who(c, m) {
  if
  :: FAULTY(c, m) -> printf("  member %d (faulty): c%d ", m, c)
  :: else -> printf("  member %d: c%d ", m, c)
  fi
}

/* Slot s of record c's history has the value, for whoever reads the streams of c. */
inline decide(c, g, s, value) {
  printf("      => slot %d is decided in c%d, view %d: ", s + 1, c, g); say(value); printf("\n");
  if
  :: decided[s] != NOTHING && decided[s] != value -> printf("VIOLATION: agreement on slot %d\n", s + 1); assert(false)
  :: else
  fi;
  if
  :: g == 0 && record[c].new_view && record[c].S[s] != value ->
    printf("VIOLATION: NEW-VIEW(1) of c%d has lost slot %d\n", c, s + 1); assert(false)
  :: else
  fi;
  for (x : 1 .. RECORDS - 1) {
    if
    :: record[x].is_active && record[x].base == c && record[x].pinned[s] != value ->
      printf("VIOLATION: ACTIVE(c%d) has lost slot %d\n", x, s + 1); assert(false)
    :: else
    fi
  }
  if
  :: decided[s] == NOTHING -> decided[s] = value; decided_in[s] = c
  :: else
  fi
}

inline vote(c, g, s, kind, m) {
  VOTES(c, g, s, kind) = VOTES(c, g, s, kind) | ONLY(m);
  if
  :: SIZE(VOTES(c, g, s, kind)) >= QC -> decide(c, g, s, VALUE(c, g, kind))
  :: else
  fi
}

/* The log of m in the epoch of c, up to here. */
inline keep_log(c, m) {
  for (i : 0 .. SLOTS - 1) {
    top = NOTHING;
    for (j : 0 .. VIEWS - 1) {
      for (k : 0 .. KINDS - 1) {
        if
        :: HAS(VOTES(c, j, i, k), m) -> top = 16 * j + VALUE(c, j, k)
        :: else
        fi
      }
      if
      :: j == 0 && ENTERED(c, m) && record[c].S[i] -> top = 16 + record[c].S[i]
      :: else
      fi
    }
    LOG(c, m, i) = top
  }
}

inline lose_log(c, m) {
  for (i : 0 .. SLOTS - 1) { LOG(c, m, i) = NOTHING }
}

#ifdef R1_ACROSS_EPOCHS
#define SEEN(c, m, s) ((c) == 1 && HAS(late, m) && !CLEANSED(1) -> 0 : LOG(c, m, s))
#else
#define SEEN(c, m, s) LOG(c, m, s)
#endif

/* S of base c by the votes of a and b (section 5's merge): the whole history that results, in S; its length. */
inline merge(c, a, b) {
  length = record[c].length;
  for (i : 0 .. SLOTS - 1) {
    top = (i < record[c].length -> 0 : (SEEN(c, a, i) > SEEN(c, b, i) -> SEEN(c, a, i) : SEEN(c, b, i)));
    S[i] = (i < record[c].length -> record[c].pinned[i] : top % 16);
    if
    :: top -> length = i + 1
    :: else
    fi
  }
  for (i : 0 .. SLOTS - 1) {
    if
    :: i < length && S[i] == NOTHING -> S[i] = NOOP
    :: else
    fi
  }
}

#define PRINT_STATE(slots, state) for (i : 0 .. slots - 1) { printf(" "); say(state[i]) } printf(" (length %d)\n", slots)

/* The pairs of places whose votes give an S. */
#define UNVERIFIED 3
#define A_OF(q) ((q) == 2 -> 1 : 0)
#ifdef TWO_WEDGES_OF_ONE
#define B_OF(q) A_OF(q)
#define COUNTS(c, q) (HAS(record[c].wedged, A_OF(q)) && HAS(record[c].stopped, A_OF(q)))
#else
#define B_OF(q) ((q) == 0 -> 1 : 2)
#define COUNTS(c, q) (HAS(VOTE(c), A_OF(q)) && HAS(VOTE(c), B_OF(q)))
#endif
#ifdef EPOCH_END_OF_ANOTHER_EPOCH
#define VOTE(c) (record[c].wedged | record[c].stopped | ((c) == 1 -> record[0].ended : 0))
#else
#define VOTE(c) (record[c].wedged | record[c].stopped)
#endif

/* A correct member confirms every S that it has verified, and a faulty one signs anything. So an S has the confirmations
 * that it needs as soon as it can be verified; and one that cannot be has those of the faulty members. */
#ifdef CONFIRMATIONS_F
#define CONFIRMATIONS F
#else
#define CONFIRMATIONS (F + 1)  /* f' + k' + 1, k' = 0 */
#endif
#ifdef CONFIRMS_UNVERIFIED
#define CAN_FORGE(c) true
#else
#define CAN_FORGE(c) ((CLEANSED(c) -> 0 : F) >= CONFIRMATIONS)
#endif

inline activate(c, q) {
  if
  :: q == UNVERIFIED -> merge(record[c].base, 0, 0); length = record[record[c].base].length + 1; S[length - 1] = BOGUS
  :: else -> merge(record[c].base, A_OF(q), B_OF(q))
  fi;
  printf("  controller: CAS of c%d on base c%d to ACTIVE, ", c, record[c].base);
  if
  :: q == UNVERIFIED -> printf("%d confirmed what no wedges give:", CONFIRMATIONS)
  :: else -> printf("S of the votes of %d and %d:", A_OF(q), B_OF(q))
  fi;
  PRINT_STATE(length, S);
  for (x : 1 .. RECORDS - 1) {
    if
    :: record[x].is_active && record[x].base == record[c].base ->
      printf("VIOLATION: c%d and c%d are both successors of c%d\n", x, c, record[c].base); assert(false)
    :: else
    fi
  }
  record[c].is_active = 1;
  newest = c;
  record[c].length = length;
  for (i : 0 .. SLOTS - 1) {
    record[c].pinned[i] = (i < length -> S[i] : NOTHING);
    if
    :: S[i] == BOGUS || decided[i] != NOTHING && decided[i] != record[c].pinned[i] ->
      printf("VIOLATION: ACTIVE(c%d) has lost slot %d\n", c, i + 1); assert(false)
    :: else
    fi;
    if
    :: decided[i] == NOTHING && i < length -> decided[i] = S[i]; decided_in[i] = c
    :: else
    fi
  }
}

/* A reply before ACTIVE: with the faulty member's it makes f + 1, and a client believes it. */
inline answer(c, q, m) {
  merge(record[c].base, A_OF(q), B_OF(q));
  who(c, m); printf("executes S of the votes of %d and %d and answers with the faulty member:", A_OF(q), B_OF(q)); PRINT_STATE(length, S);
  for (i : record[record[c].base].length .. length - 1) {
    if
    :: decided[i] == NOTHING -> decided[i] = S[i]; decided_in[i] = record[c].base
    :: else
    fi
  }
}

/* ---- the moves of one member ---------------------------------------------------------------------------------------- */
#define PROPOSE(c, g, s) \
  :: d_step { s < SLOTS && IN_VIEW(c, g, m) && s >= record[c].length && VOTES(c, g, s, FIRST) == 0 && PROPOSER(g, s) == m && !(ENTERED(c, m) && s < record[c].s_max) -> \
    who(c, m); printf("PREPARE(view %d, slot %d) ", g, s + 1); say(VALUE(c, g, FIRST)); printf("\n"); vote(c, g, s, FIRST, m); skip }
#define COMMIT(c, g, s, kind) \
  :: d_step { s < SLOTS && IN_VIEW(c, g, m) && VOTES(c, g, s, kind) && !VOTED(c, g, s, m) -> \
    who(c, m); printf("COMMIT(view %d, slot %d) ", g, s + 1); say(VALUE(c, g, kind)); printf("\n"); vote(c, g, s, kind, m); skip }
#define VIEW_CHANGE(c) \
  :: d_step { record[c].is_active && OPEN(c, m) && !CHANGED(c, m) && (FAULTY(c, m) || !ENTERED(c, m)) -> \
    who(c, m); printf("VIEW-CHANGE(1)\n"); record[c].changed = record[c].changed | ONLY(m) }
/* A stopped replica's log is its VIEW-CHANGE to any view above its own (section 6, step 5). */
#define LOG_0(c, j, s) (HAS(VOTES(c, 0, s, FIRST), j) -> VALUE(c, 0, FIRST) : NOTHING)
#define CHANGE(c, j) HAS(record[c].changed | record[c].stopped, j)
#define NEW_VIEW(c, a, b) \
  :: d_step { m == 1 && record[c].is_active && OPEN(c, m) && !record[c].new_view && (FAULTY(c, m) || CHANGED(c, m)) && CHANGE(c, a) && CHANGE(c, b) -> \
    record[c].new_view = 1; record[c].s_max = record[c].length; \
    for (i : 0 .. SLOTS - 1) { \
      if \
      :: i < record[c].length \
      :: i >= record[c].length && (LOG_0(c, a, i) || LOG_0(c, b, i)) -> record[c].S[i] = (LOG_0(c, a, i) -> LOG_0(c, a, i) : LOG_0(c, b, i)); record[c].s_max = i + 1 \
      :: else \
      fi \
    } \
    for (i : 0 .. SLOTS - 1) { \
      if \
      :: i >= record[c].length && i < record[c].s_max && record[c].S[i] == NOTHING -> record[c].S[i] = NOOP \
      :: else \
      fi \
    } \
    who(c, m); printf("NEW-VIEW(1) of %d and %d:", a, b); PRINT_STATE(record[c].s_max, record[c].S); \
    for (i : record[c].length .. SLOTS - 1) { \
      if \
      :: decided[i] && decided_in[i] == c && decided[i] != record[c].S[i] -> \
        printf("VIOLATION: NEW-VIEW(1) of c%d has lost slot %d\n", c, i + 1); assert(false) \
      :: else \
      fi \
    } \
    record[c].entered = ONLY(m) }
#define COMMIT_NEW_VIEW(c) \
  :: d_step { record[c].new_view && OPEN(c, m) && !ENTERED(c, m) -> \
    who(c, m); printf("COMMIT(NEW-VIEW(1))\n"); record[c].entered = record[c].entered | ONLY(m); \
    for (i : record[c].length .. record[c].s_max - 1) { \
      if \
      :: SIZE(record[c].entered) >= QC -> decide(c, 1, i, record[c].S[i]) \
      :: else \
      fi \
    } \
    skip }
/* VIEW-CHANGE(c', 0): one wedge serves every record on its base. */
#define MAY_WEDGE(c) (record[c].is_active && SUCCESSOR(c) && !HAS(record[c].wedged, m) && !HAS(record[c].ended, m))
#ifdef WEDGE_WITHOUT_EPOCH_END
#define EPOCH_END(c) printf("\n");
#else
#define EPOCH_END(c) printf(" and EPOCH-END\n"); record[c].ended = record[c].ended | ONLY(m);
#endif
#ifdef R1_ACROSS_EPOCHS
#define LATE(c) late = late | ((c) == 0 && record[2].prepared && FAULTY(0, m) -> ONLY(m) : 0);
#else
#define LATE(c)
#endif
#define WEDGE(c) \
  :: d_step { MAY_WEDGE(c) -> who(c, m); printf("VIEW-CHANGE(c', 0)"); EPOCH_END(c) \
    keep_log(c, m); record[c].wedged = record[c].wedged | ONLY(m); LATE(c) skip }
#define ANSWER(c, q) \
  :: d_step { record[c].prepared && !record[c].is_active && !FAULTY(c, m) && COUNTS(record[c].base, q) -> answer(c, q, m); skip }
/* The carried stream of a faulty member holds its wedge twice. Who begins at the first copy reads one history of c', who
 * begins at the second another: for the second reader R3 starts afresh. */
#define PROPOSE_IN_SECOND_HISTORY(c) \
  :: d_step { FAULTY(c, m) && IN_VIEW(c, 0, m) && VOTES(c, 0, SLOTS - 1, FIRST) && !VOTES(c, 0, SLOTS - 1, SECOND) && PROPOSER(0, SLOTS - 1) == m && SLOTS > record[c].length -> \
    who(c, m); printf("the wedge of its carried stream again, then PREPARE(view 0, slot %d) ", SLOTS); say(VALUE(c, 0, SECOND)); printf("\n"); \
    vote(c, 0, SLOTS - 1, SECOND, m); skip }
#define LEND_EPOCH_END(c) \
  :: d_step { FAULTY(c, m) && record[c].is_active && SUCCESSOR(c) && OPEN(c, m) && !HAS(record[c].stopped, m) -> \
    who(c, m); printf("EPOCH-END signed by the KSS, with an empty log; its epoch goes on\n"); lose_log(c, m); record[c].stopped = record[c].stopped | ONLY(m) }

#define EACH_SLOT(c, g) PROPOSE(c, g, 0) PROPOSE(c, g, 1) COMMIT(c, g, 0, FIRST) COMMIT(c, g, 1, FIRST)
#if VIEWS > 1
#define EACH_VIEW(c) EACH_SLOT(c, 0) EACH_SLOT(c, 1) VIEW_CHANGE(c) NEW_VIEW(c, 0, 1) NEW_VIEW(c, 0, 2) NEW_VIEW(c, 1, 2) COMMIT_NEW_VIEW(c)
#else
#define EACH_VIEW(c) EACH_SLOT(c, 0)
#endif
#define EACH_PAIR(ACTION, c) ACTION(c, 0) ACTION(c, 1) ACTION(c, 2)

proctype member(byte m) {
end:
  do
  EACH_VIEW(0)
  WEDGE(0)
#ifndef ONE_SUCCESSOR
  EACH_VIEW(1)
  WEDGE(1)
#endif
  /* The last record orders nothing: none follows that could lose it. */
#ifdef ANSWERS_BEFORE_ACTIVE
  EACH_PAIR(ANSWER, 1)
#endif
#ifdef COUNTERS_CARRIED_OVER
  PROPOSE_IN_SECOND_HISTORY(1)
  COMMIT(1, 0, SLOTS - 1, SECOND)
#endif
#ifdef EPOCH_END_BY_KSS
  LEND_EPOCH_END(0)
#endif
  od
}

/* ---- controllers, CONFIG STORAGE and the adversary ------------------------------------------------------------------- */
#define PREPARE_RECORD(c, on, cleansing) \
  :: d_step { !record[c].prepared && (c == 1 || record[1].prepared) && record[on].is_active && !(cleansing && CLEANSED(on)) -> \
    record[c].prepared = 1; record[c].base = on; record[c].cleansed = cleansing; \
    printf("  controller: PREPARED(c%d) on base c%d, ", c, on); \
    if :: cleansing -> printf("replaces %d\n", faulty) :: else -> printf("the same members\n") fi; \
    skip }
#define EACH_RECORD(c, on) PREPARE_RECORD(c, on, 0) PREPARE_RECORD(c, on, 1)
/* The controller has an epoch closed; the log, complete up to the counter, is then that member's vote. */
#ifdef TWO_WEDGES_OF_ONE
#define MAY_STOP(c, r) (!HAS(record[c].stopped, r))
#else
#define MAY_STOP(c, r) (!HAS(record[c].stopped | record[c].ended, r))
#endif
#define STOP(c, r) \
  :: d_step { record[c].is_active && SUCCESSOR(c) && MAY_STOP(c, r) -> \
    HAND_OVER(c, r) record[c].stopped = record[c].stopped | ONLY(r); record[c].ended = record[c].ended | ONLY(r) }
#if defined(LOG_WITHOUT_TAIL)
#define HAND_OVER(c, r) lose_log(c, r); printf("  controller: EPOCH-END(%d, c%d), what is left of its log is handed over: nothing\n", r, c);
#elif defined(LOG_COPIED)
#define HAND_OVER(c, r) keep_log(c, r); printf("  controller: a copy of %d's log in c%d is handed over; it runs on\n", r, c);
#else
#define HAND_OVER(c, r) keep_log(c, r); printf("  controller: EPOCH-END(%d, c%d), its log is handed over\n", r, c);
#endif
#ifdef CAS_WITHOUT_BASE
#define BASE_HOLDS(c) true
#else
#define BASE_HOLDS(c) (newest == record[c].base)
#endif
#define NEWEST(c) ((c) == 2 || !record[2].prepared || record[2].base != record[1].base)
#define CAS(c, q) \
  :: d_step { record[c].prepared && !record[c].is_active && BASE_HOLDS(c) && NEWEST(c) && (q == UNVERIFIED -> CAN_FORGE(c) : COUNTS(record[c].base, q)) -> activate(c, q); skip }
/* The adversary moves on once the first faulty incarnation is out. f counts per configuration: it may take a member that is
 * done with the configuration before. What that one can still sign there adds to what the first one left behind. */
#define TAKE(m) \
  :: d_step { newest == 1 && CLEANSED(1) && m != faulty && HAS(record[0].wedged | record[0].stopped, m) && !HAS(record[0].ended, m) -> \
    printf("  adversary: takes member %d of c1\n", m); \
    printf("VIOLATION: %d, by then cleansed, and %d have both signed a false statement under c0: f+1 signers\n", faulty, m); \
    assert(false) }

proctype world() {
end:
  do
  EACH_RECORD(1, 0)
#ifndef ONE_SUCCESSOR
  EACH_RECORD(2, 0)
  EACH_RECORD(2, 1)
  EACH_PAIR(STOP, 1)
  EACH_PAIR(CAS, 2)
#endif
  EACH_PAIR(STOP, 0)
  EACH_PAIR(CAS, 1)
  CAS(1, UNVERIFIED)
  TAKE(0)
  TAKE(1)
  TAKE(2)
  od
}

init {
  atomic {
    select (faulty : 0 .. N - 1);
    record[0].prepared = 1;
    record[0].is_active = 1;
    run member(0);
    run member(1);
    run member(2);
    run world()
  }
}
